"""Configuration of MM-Rec models for transformers.

``mmrec export --to transformers`` writes this file beside the weights, so it imports nothing of
mmrec.
"""

from typing import Any

from transformers import PretrainedConfig


class MMRecConfig(PretrainedConfig):
    """The shape of one MM-Rec model; the settings are those of ``mmrec.ModelConfig``."""

    model_type = "mmrec"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
    }

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        vocab_size: int = 5000,
        layer_pattern: str = "b",
        recurrent_blocks: int = 1,
        ffn_multiplier: float = 5.5,
        conv_width: int = 4,
        dropout: float = 0.0,
        ngram_buckets: int = 0,
        max_ngram: int = 3,
        max_timescale: int = 256,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        """Create the configuration.

        Args:
            width: D, the size of the residual stream and of the recurrent state.
            depth: number of layers.
            heads: H, number of heads of the gated delta rule.
            vocab_size: V, number of token ids.
            layer_pattern: types of the layers, one letter per layer, repeated up to the depth.
            recurrent_blocks: diagonal blocks of the recurrent weight.
            ffn_multiplier: width of the feed-forward network as a multiple of D.
            conv_width: K, width of the causal convolution.
            dropout: dropout probability of each residual branch.
            ngram_buckets: rows of the hashed n-gram embedding; 0 leaves it out.
            max_ngram: longest n-gram that has an embedding, in tokens.
            max_timescale: longest time constant of the decays at initialisation, in tokens.
            use_cache: whether a call returns the recurrent state.
            others: settings that all models of transformers have.
        """
        self.width, self.depth, self.heads = width, depth, heads
        self.vocab_size, self.layer_pattern = vocab_size, layer_pattern
        self.recurrent_blocks, self.ffn_multiplier = recurrent_blocks, ffn_multiplier
        self.conv_width, self.dropout = conv_width, dropout
        self.ngram_buckets, self.max_ngram = ngram_buckets, max_ngram
        self.max_timescale, self.use_cache = max_timescale, use_cache
        super().__init__(**others)
