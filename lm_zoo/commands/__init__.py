"""The subcommands of `lm-zoo`, one file each: `add_arguments(parser)` and `run(arguments)`.

They import what they need when they run, so that `--help` and a mistyped option answer at once.
"""
