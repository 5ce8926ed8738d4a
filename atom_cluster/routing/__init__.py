"""Where a request goes: the prefix index, the load view and the policy over both. Pure: no sockets, no clocks."""
