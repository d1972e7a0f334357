"""`lm-eval`, the harness of published tables, on models with a recurrent state."""
