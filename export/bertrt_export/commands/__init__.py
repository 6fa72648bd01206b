"""The subcommands of ``bertrt`` that need the exporter; found through entry points."""
