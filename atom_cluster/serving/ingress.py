"""Stop 3 of 14 is hosted here: the ingress's Serve deployment. Next: atom_cluster/api/routes.py.

Puts the HTTP API, the tokenizer and the cluster client together. Serve's proxy calls the ASGI app; everything between
ingress and engines goes over the client's ZMQ endpoint.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket

from fastapi import FastAPI
from ray import serve
from ray.runtime_context import get_runtime_context
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from atom_cluster.api.answers.grammars import GrammarService
from atom_cluster.api.protection.gate import Gate
from atom_cluster.api.routes import create_app
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.env import read_environment
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.gang.ray_metrics import RayMetrics
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Membership
from atom_cluster.observability.metrics import BUILD_INFO
from atom_cluster.observability.process import build_labels
from atom_cluster.serving.cluster_client import ClusterClient
from atom_cluster.serving.membership import Announcer
from atom_cluster.serving.past import has_served, note_served
from atom_cluster.serving.recording import make_recorder, set_up_logs
from atom_cluster.serving.secret import cluster_secret
from atom_cluster.structured.compiler import GrammarCompiler


@serve.ingress()
class Ingress:
    """One HTTP front end. Holds no state that a client would miss but its open connections."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, reasons: dict[str, str], router: DeploymentHandle, *groups: DeploymentHandle
    ) -> None:
        """`groups` are not called; naming them here is how Serve learns that the application contains them."""
        options = config.model_options
        model_dir = await asyncio.to_thread(resolve_model_path, config.model, options.revision)
        max_model_len = None if options.max_model_len == "auto" else options.max_model_len
        model = ServedModel.from_directory(
            model_dir,
            served_name=options.served_name,
            max_model_len=max_model_len,
            uses_recommendations=config.api.generation_config == "auto",
        )
        compiler = GrammarCompiler.for_model(model_dir, model.vocab_size)
        compiler.warm_up()
        self._grammars = GrammarService(compiler, timeout_s=config.api.grammar_timeout_s)
        self._tokenizer = TokenizerService.from_directory(
            model_dir, num_threads=config.api.tokenizer_threads, chat_template=config.api.chat_template
        )
        context = serve.get_replica_context()
        replica_id = context.replica_id.unique_id
        self._application = context.app_name
        self._actor = get_runtime_context().get_actor_name() or ""
        self._has_served = has_served(self._application)
        name = f"ingress-{replica_id}"
        set_up_logs(config.observability, role="ingress", replica=name)
        self._recorder = make_recorder(config.observability, ingress=name, model=model.name)
        metrics = RayMetrics(labels={"role": "ingress", "replica": replica_id})
        metrics.set(BUILD_INFO, 1, **build_labels(model.name))
        self._client = ClusterClient(
            config=config,
            reasons=reasons,
            model=model,
            metrics=metrics,
            has_had_engines=self._has_served,
            timelines=self._recorder.store,
        )
        gate = Gate(
            config.api.protection,
            metrics=metrics,
            api_keys_file=read_environment().api_keys_file,
            num_ingresses=config.serving.ingress_replicas,
        )
        self._endpoint = Endpoint(
            key=ClusterKey.from_secret(cluster_secret()),
            peer_id=name,
            host=get_node_ip_address(),
            epoch=random.getrandbits(62),
            on_message=self._client.receive,
            on_lost=self._client.lose,
            ping_period_s=config.serving.ping_period_s,
            peer_timeout_s=config.serving.client_timeout_s,
        )
        await self._endpoint.start()
        self._client.attach(self._endpoint)
        self._announcer = Announcer(
            router=router,
            card=self._card,
            period_s=config.serving.announce_period_s,
            on_membership=self._update,
        )
        self._announcer.start()
        self._app = create_app(
            generator=self._client,
            tokenizer=self._tokenizer,
            model=model,
            limits=config.api,
            metrics=metrics,
            gate=gate,
            recorder=self._recorder,
            grammars=self._grammars,
            proxy_sends_request_id=True,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this after the constructor and routes the proxy's requests to the result."""
        return self._app

    def __del__(self) -> None:
        """Serve calls this when the replica stops: spans that wait to be sent get a moment."""
        recorder = getattr(self, "_recorder", None)
        if recorder is not None and recorder.tracer is not None:
            recorder.tracer.close()

    def _update(self, membership: Membership) -> None:
        self._client.update(membership)
        if self._client.has_had_engines and not self._has_served:
            self._has_served = note_served(self._application)

    def _card(self) -> MemberCard:
        return MemberCard(
            address=self._endpoint.address,
            kind="ingress",
            node=socket.gethostname(),
            pid=os.getpid(),
            actor=self._actor,
        )
