"""How a run is laid over its devices, in numbers: what memory and time are computed from."""

from collections import Counter
from dataclasses import dataclass
from functools import cache

from samba_megatron.config import RunConfig
from samba_megatron.config.pattern import split_stages
from samba_megatron.model.layers import KINDS


@dataclass(frozen=True)
class Layout:
    """A configuration on a number of devices."""

    config: RunConfig
    world_size: int

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def context(self) -> int:
        """Context-parallel ranks."""
        return self.config.parallel.context_parallel_size

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def virtual(self) -> int:
        """Model chunks of a stage."""
        return self.config.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def data(self) -> int:
        """Data-parallel ranks: what is left."""
        return max(self.world_size // (self.tensor * self.context * self.pipeline), 1)

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that share the optimizer's state of the same parameters."""
        return self.data * self.context

    @property
    def micro_batches(self) -> int:
        """Of a rank in a step; a piece of a sequence is one of its own."""
        training = self.config.training
        number = max(training.global_batch_size // (training.micro_batch_size * self.data), 1)
        return number * self.pieces

    @property
    def pieces(self) -> int:
        """Of a sequence, one after the other."""
        return self.config.parallel.sequence_pieces

    @property
    def has_first_pass(self) -> bool:
        """Whether every piece is computed once before, for what it leaves to the next."""
        exact = self.config.parallel.sequence_piece_gradients == "exact"
        return self.pieces > 1 and exact

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a rank; tensor parallelism does not divide them."""
        training = self.config.training
        length = self.config.data.sequence_length // (self.context * self.pieces)
        return training.micro_batch_size * length

    @property
    def sequence_split(self) -> int:
        """Ranks that share the tokens between the layers."""
        return self.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def element(self) -> int:
        """Bytes of a parameter or activation; ``auto`` is what a GPU has, bf16."""
        return 4 if self.config.precision.params_dtype == "fp32" else 2

    def chunks(self, stage: int) -> list[str]:
        """The layers of a stage's chunks."""
        virtual = self.config.parallel.virtual_pipeline_model_parallel_size
        return _split(self.config.model.hybrid_layer_pattern, self.pipeline, virtual)[
            stage :: self.pipeline
        ]

    def _counts(self, stage: int) -> Counter[str]:
        """How many layers of each kind a stage has."""
        return Counter("".join(self.chunks(stage)))

    def layer_parameters(self, stage: int) -> int:
        """Parameters of a stage's layers on one rank; what tensor parallelism does not split is
        counted whole."""
        model = self.config.model
        total = 0
        for symbol, count in self._counts(stage).items():
            whole = KINDS[symbol].unsplit_parameters(model)
            split = (KINDS[symbol].parameters(model) - whole) // self.tensor
            total += count * (split + whole)
        return total

    def fp32_parameters(self, stage: int) -> int:
        """Those of :meth:`layer_parameters` that are fp32 in a bf16 model."""
        model = self.config.model
        return sum(
            count * (KINDS[symbol].fp32_parameters(model) // self.tensor)
            for symbol, count in self._counts(stage).items()
        )

    def kept_in_fp8(self, stage: int) -> int:
        """Those of :meth:`layer_parameters` that ``precision.fp8_param_gather`` keeps in FP8."""
        if not (self.config.precision.fp8 and self.config.precision.fp8_param_gather):
            return 0
        model = self.config.model
        return sum(  # a multiply-add a number
            count * (int(KINDS[symbol].linear_flops_per_token(model)) // 2 // self.tensor)
            for symbol, count in self._counts(stage).items()
        )

    def parameters(self, stage: int) -> int:
        """All parameters of a rank of a stage: a tied matrix is on the first stage and the last."""
        model, last = self.config.model, self.pipeline - 1
        matrices = int(stage == 0)
        if stage == last and not (stage == 0 and model.share_embeddings_and_output_weights):
            matrices += 1
        final_norm = model.hidden_size if stage == last else 0
        matrix = model.vocab_size * model.hidden_size // self.tensor
        return self.layer_parameters(stage) + matrices * matrix + final_norm


_split = cache(split_stages)
"""A search asks for the same cuts again and again."""
