from __future__ import annotations

import pytest
from pydantic import BaseModel
from ray.serve import schema

from atom_cluster.config import serve_file


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (serve_file.ServeFile, schema.ServeDeploySchema),
        (serve_file.HttpOptions, schema.HTTPOptionsSchema),
        (serve_file.LoggingOptions, schema.LoggingConfig),
        (serve_file.ServeApplication, schema.ServeApplicationSchema),
        (serve_file.DeploymentOptions, schema.DeploymentSchema),
        (serve_file.ActorOptions, schema.RayActorOptionsSchema),
    ],
)
def test_every_key_we_allow_is_one_that_serve_reads(ours: type[BaseModel], theirs: type[BaseModel]) -> None:
    assert set(ours.model_fields) <= set(theirs.model_fields)
