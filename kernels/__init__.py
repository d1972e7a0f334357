"""The ops that every model of the zoo shares. They know nothing of models."""

if __name__ == "kernels":
    # Not a part of lm_zoo: in the root of a checkout transformers has looked for Hugging Face's package of that name,
    # and found this folder. The version says that it is not the one.
    __version__ = "0"
else:
    from lm_zoo.kernels.causal_conv import causal_conv1d
    from lm_zoo.kernels.linear_attention import linear_attention, linear_attention_step
    from lm_zoo.kernels.linear_scan import linear_scan, linear_scan_step
    from lm_zoo.kernels.norms import l2_norm, rms_norm
    from lm_zoo.kernels.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "causal_conv1d",
    "l2_norm",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
]
