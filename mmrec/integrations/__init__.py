"""mmrec's kernels in other libraries: models of transformers, and code written for GPU packages.

``transformers`` has ``enable`` and ``disable`` for models of Hugging Face transformers. ``shims``
puts modules named fla, mamba_ssm and causal_conv1d in place for code that imports them.
"""
