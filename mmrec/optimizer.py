"""The optimizer: Muon for the weight matrices of the layers, RMSprop with one mean square per row
for a large n-gram embedding, AdamW for everything else.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrec.config import OptimizerConfig
from mmrec.kernels.rowwise_rmsprop.op import rowwise_rmsprop_
from mmrec.model import Layer, Linear, Model
from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mmrec.runtime.hardware import bfloat16_instructions, fastest_dtype

# Coefficients of the quintic Newton-Schulz iteration (see newton_schulz).
A, B, C = 3.4445, -4.7750, 2.0315
MAX_BATCH_ELEMENTS = 1 << 24
"""Elements of the matrices that are orthogonalised at once. Each takes 20 bytes meanwhile; 28 in
float32."""
MEAN_SQUARE_DECAY = 0.99
"""How much of the mean square of a row's gradients stays at the row's next gradient."""

Task = Callable[[], object]


def run_in_turn(tasks: Sequence[Task]) -> None:
    """Run tasks one after the other. This is the default of ``MuonAdamW``."""
    for task in tasks:
        task()


def newton_schulz(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately orthogonalise matrices: their singular values move to about 0.7 to 1.2.

    Args:
        x: (N, rows, columns), any floating dtype.
        steps: iterations.
        dtype: that of the iteration. bfloat16 suffices; float32 is faster on a processor without
            bfloat16 instructions.

    Returns:
        (N, rows, columns) float32.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
    (kellerjordan.github.io/posts/muon), with its coefficients.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if is_tall else x).to(dtype)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if is_tall else x).float()


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups of parameters with ``use_muon=True``, AdamW for the other groups.

    Of the others, those with ``rowwise=True`` get RMSprop by row.

    Muon moves a matrix by its orthogonalised Nesterov momentum, so that every direction moves by
    the same amount, however small its gradient. The step is scaled by
    sqrt(max(1, rows / columns)). Source: Jordan et al. 2024, see ``newton_schulz``.

    RMSprop by row moves the rows that have a gradient, and decays those only
    (``mmrec.kernels.rowwise_rmsprop``). The gradient may be sparse; then a step does not depend on
    the number of rows.

    Each group keeps its peak rate as ``initial_lr``; a schedule sets ``lr`` from it. In a
    distributed run each process orthogonalises a share of the matrices.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        matrix_lr: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
        newton_schulz_dtype: torch.dtype | None = None,
        run_tasks: Callable[[Sequence[Task]], object] = run_in_turn,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Make an optimizer for parameter groups.

        Args:
            groups: dicts of ``params``, ``weight_decay``, ``use_muon``, and perhaps ``rowwise`` and
                ``lr_scale``, which multiplies the group's rate. Matrices of Muon may have leading
                axes.
            lr: peak learning rate of AdamW and of RMSprop by row.
            matrix_lr: Muon's peak learning rate.
            betas: AdamW's moment decays.
            momentum: Muon's momentum.
            newton_schulz_dtype: that of Muon's iteration; None for the fastest on this processor
                (``mmrec.runtime.hardware``). All processes need the same.
            run_tasks: runs the independent parts of a step; may run them in threads.
            process_group: the processes that train together.
        """
        self._run_tasks, self._process_group = run_tasks, process_group
        self.newton_schulz_dtype = newton_schulz_dtype or fastest_dtype(bfloat16_instructions())
        muon_groups = [g for g in groups if g["use_muon"]]
        rowwise_groups = [{"lr": lr} | g for g in groups if g.get("rowwise")]
        adamw_groups = [g for g in groups if not (g["use_muon"] or g.get("rowwise"))]
        self._adamw = torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, fused=True)
        super().__init__(muon_groups, {"lr": matrix_lr, "momentum": momentum})
        self.param_groups += self._adamw.param_groups + rowwise_groups
        self._adamw.state = self.state
        for group in self.param_groups:
            group["initial_lr"] = group["lr"] * group.get("lr_scale", 1.0)

    def scale_lr(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        tasks: list[Task] = [self._adamw.step]
        for group in self.param_groups:
            if group.get("rowwise"):
                tasks += [partial(self._update_rows, group, p) for p in group["params"]]
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"] if group["use_muon"] else []:
                if p.grad is not None:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    by_shape[p.shape[-2:]].append(p)
            # matrices of one shape in one task, the largest tasks first
            for shape in sorted(by_shape, key=lambda s: -s.numel() * len(by_shape[s])):
                matrices = by_shape[shape]
                limit = max(1, MAX_BATCH_ELEMENTS // shape.numel()) * self._process_group.size
                tasks += [
                    partial(self._update_matrices, group, matrices[begin : begin + limit])
                    for begin in range(0, len(matrices), limit)
                ]
        if self._process_group.size == 1:
            self._run_tasks(tasks)
        else:  # the processes exchange data within a task: all of them need one order
            run_in_turn(tasks)

    @torch.no_grad()
    def _update_rows(self, group: dict[str, Any], p: Tensor) -> None:
        if p.grad is None:
            return
        local_shard, state = self._process_group.local_shard, self.state[p]
        if "mean_square" not in state:
            mean_square = torch.zeros_like(p[:, :1])
            if "exp_avg_sq" in state:  # of a checkpoint of mmrec 0.11 or older, from AdamW
                local_shard(mean_square).copy_(local_shard(state["exp_avg_sq"]).mean(1, True))
            state.clear()
            state["mean_square"] = mean_square
        if p.grad.is_sparse:
            indices, gradients = p.grad._indices()[0], p.grad._values()
        else:
            dense = local_shard(p.grad)
            indices = dense.any(1).nonzero()[:, 0]
            gradients = dense[indices]
        rowwise_rmsprop_(
            local_shard(p),
            local_shard(state["mean_square"]).view(-1),
            indices,
            gradients,
            group["lr"],
            MEAN_SQUARE_DECAY,
            group["weight_decay"],
        )

    @torch.no_grad()
    def _update_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        rows, columns = params[0].shape[-2:]
        local_shard, updates = self._process_group.local_shard, []
        for p in params:
            assert p.grad is not None
            momentum, grad = local_shard(self.state[p]["momentum"]), local_shard(p.grad)
            momentum.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(momentum, group["momentum"]))
        shapes = [p.shape for p in params]
        dtype = self.newton_schulz_dtype
        directions = self._process_group.map_sharded(
            partial(_orthogonalise, dtype=dtype), updates, shapes, dtype
        )
        lr = group["lr"] * max(1, rows / columns) ** 0.5
        for p, direction in zip(params, directions, strict=True):
            decay = 1 - group["lr"] * group["weight_decay"]
            local_shard(p).mul_(decay).add_(direction, alpha=-lr)


def _orthogonalise(updates: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Orthogonalise each matrix of tensors (…, rows, columns), all in one batch, in ``dtype``."""
    matrices = [u.view(-1, *u.shape[-2:]) for u in updates]
    batch = newton_schulz(torch.cat(matrices), dtype=dtype)
    directions = batch.split([len(m) for m in matrices])
    return [d.view_as(u) for d, u in zip(directions, updates, strict=True)]


def parameter_groups(
    model: Model, weight_decay: float, ngram_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Divide the parameters of a model into groups for ``MuonAdamW``.

    Args:
        model: the model, with LoRA factors or without.
        weight_decay: that of the matrices of the layers.
        ngram_weight_decay: that of the n-gram embedding.

    Returns:
        The matrices of the layers, for Muon, with ``weight_decay``; everything else without decay;
        and the n-gram embedding with ``ngram_weight_decay``, without which it memorises the text.
        A large one (``ModelConfig.has_large_ngram_table``) is for RMSprop by row.
    """
    matrix_ids = set()
    for module in model.layers.modules():
        if isinstance(module, Linear):
            matrix_ids.add(id(module.weight))
        elif isinstance(module, Layer) and module.recurrent_weight is not None:
            matrix_ids.add(id(module.recurrent_weight))
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    ngram: list[Tensor] = []
    in_layers = list(model.layers.parameters())
    for p in in_layers:
        (matrices if id(p) in matrix_ids else others).append(p)
    layer_ids = {id(p) for p in in_layers}
    for name, p in model.named_parameters():
        if id(p) not in layer_ids:
            (ngram if name == "ngram_embedding" else others).append(p)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "use_muon": True},
        {"params": others, "weight_decay": 0.0, "use_muon": False},
    ]
    if ngram:
        group = {"params": ngram, "weight_decay": ngram_weight_decay, "use_muon": False}
        groups.append(group | {"rowwise": model.config.has_large_ngram_table})
    return groups


def clipped_parameters(model: Model) -> list[Tensor]:
    """The parameters of a model whose gradients count in the global norm, and are clipped by it.

    Those are all but a large n-gram embedding, whose optimizer divides the gradient of each row by
    its own size. A value of its gradient is also one of the embedding's, so a value that is not
    finite shows in the norm.
    """
    left_out = {"ngram_embedding"} if model.config.has_large_ngram_table else set()
    return [p for name, p in model.named_parameters() if name not in left_out]


def layerwise_lr_groups(
    model: Model, groups: list[dict[str, Any]], decay: float
) -> list[dict[str, Any]]:
    """Split parameter groups so that each one has a single ``lr_scale``.

    The top layer and the final norm learn at the full rate, each layer below at ``decay`` times the
    rate of the layer above it, and the embeddings below all layers.

    Args:
        model: the model.
        groups: as ``parameter_groups`` returns them.
        decay: the factor per layer, in (0, 1].

    Source: Howard and Ruder 2018 (arXiv:1801.06146), "discriminative fine-tuning".
    """
    depth, scales = model.config.depth, {}
    for name, p in model.named_parameters():
        layer = re.match(r"layers\.(\d+)\.", name)
        layers_above = depth - 1 - int(layer[1]) if layer else 0 if name == "norm.weight" else depth
        scales[p] = decay**layers_above
    split_groups = []
    for group in groups:
        for scale in sorted({scales[p] for p in group["params"]}):
            params = [p for p in group["params"] if scales[p] == scale]
            split_groups.append(group | {"params": params, "lr_scale": scale})
    return split_groups


def build_optimizer(
    model: Model,
    config: OptimizerConfig = OptimizerConfig(),
    *,
    layerwise_lr_decay: float = 1.0,
    newton_schulz_dtype: torch.dtype | None = None,
    run_tasks: Callable[[Sequence[Task]], object] = run_in_turn,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> MuonAdamW:
    """Make the optimizer of a model from its settings.

    Args:
        model: frozen parameters get no gradient and are left as they are.
        config: rates, decays and betas.
        layerwise_lr_decay: see ``layerwise_lr_groups``; 1 gives all layers one rate.
        newton_schulz_dtype, run_tasks, process_group: see ``MuonAdamW``.

    Returns:
        The optimizer, with no state yet.
    """
    groups = parameter_groups(model, config.weight_decay, config.ngram_weight_decay)
    if layerwise_lr_decay < 1:
        groups = layerwise_lr_groups(model, groups, layerwise_lr_decay)
    return MuonAdamW(
        groups,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=(config.beta1, config.beta2),
        newton_schulz_dtype=newton_schulz_dtype,
        run_tasks=run_tasks,
        process_group=process_group,
    )
