"""Muon for matrices and AdamW for everything else, in one optimizer, on one device or under FSDP2, HSDP or DDP.

`Muon(params)` takes the place of `torch.optim.Muon`; groups with `use_muon=False` run AdamW. What needs a whole matrix
runs on one rank, its owner; everything else stays where the parameter's rows are. Nothing in `step` waits for a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..newton_schulz.iteration import newton_schulz
from ..newton_schulz.polynomials import COEFFICIENTS, Coefficients, newton_schulz_flop, polynomials, safe_restarts
from . import adamw
from .exchange import Exchange
from .fitting import Settings, check_group, check_state, label
from .norms import Groups, clip_factor, groups_of, sums_of_squares, total_norm
from .owners import Block, Layout, gradient, layout_of, local
from .plan import Member, Plan, Step


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/): momentum, orthogonalised by Newton-Schulz, as the update.

    For each matrix W of a Muon group with gradient G, as torch.optim.Muon does:

        B <- B + (1 - momentum)(G - B);   U = G + momentum (B - G) with Nesterov, else B
        W <- (1 - lr·weight_decay) W - lr·ratio·newton_schulz(U)

    with ratio √max(1, rows/columns) ("original", None), 0.2·√max(rows, columns) ("match_rms_adamw",
    https://arxiv.org/abs/2502.16982) or √(rows/columns) ("spectral_unclamped").

    State is made at once, alike on every rank: `momentum_buffer` where Muon runs; `step`, `exp_avg` and `exp_avg_sq`
    where AdamW does. It is sharded with the parameter, so torch.distributed.checkpoint resumes at any world size. The
    state_dict of a torch.optim.Muon loads.

    Gradients that are not finite: their entries leave the momentum as it was, the matrix they are in is not updated
    (the others are), and `nonfinite`, a tensor on the device, counts it. AdamW's part is left out whole and counts as
    one.

    `step` clips, too, if it is asked to, and `grad_norm` is then the norm of all gradients, a tensor on the device.

    Under FSDP2 and HSDP each matrix is orthogonalised by one rank of the mesh, chosen by `assign_owners`. Every rank
    must call `step` and give all groups alike. A parameter without a gradient on any rank is not changed.

    Args:
        params: parameters, (name, parameter) pairs, or groups of these. A group may set `use_muon` (False: AdamW, with
            `betas`, and `eps` of 1e-8 unless given) and every argument from lr to adjust_lr_fn and split_sizes.
        lr: learning rate, a number or a tensor with one element.
        weight_decay: decoupled; multiplied by lr.
        momentum: μ in [0, 1].
        ns_coefficients: as `newton_schulz` takes them.
        ns_steps: the same.
        eps: added to the norm of what is orthogonalised.
        adjust_lr_fn: which ratio. "match_rms_adamw" is the default here, None ("original") that of torch.optim.Muon.
        distributed_mesh: the DeviceMesh that the parameters are sharded or replicated over. None takes every DTensor's
            own mesh. Plain tensors are, with a mesh, held to be replicas (DDP): each is orthogonalised once, and its
            update gathered.
        split_sizes: row counts of parameters that are several matrices in one (query, key and value, say), each
            orthogonalised and scaled for itself: {parameter or its name: (rows, rows, …)}. In a group the same by name,
            or one sequence for all its parameters.
        capturable: keep learning rates on the device, so that a step can be captured in a CUDA graph.
        foreach: None or True: there is one implementation, which is both this and `fused`.
        fused: as `foreach`.
        ns_algorithm: `algorithm` of `newton_schulz`.
        ns_dtype: `dtype` of `newton_schulz`.
        ns_preconditioner: `preconditioner` of `newton_schulz`.
        momentum_dtype: of `momentum_buffer`; None is float32 (float64 for float64 parameters).
        wire_dtype: bfloat16 or float32, in which rows and updates travel between ranks.

    Raises:
        ValueError: a setting is out of range, a parameter of a Muon group is no matrix, or a mesh does not fit.
        TypeError: a parameter is not floating.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = "jordan",
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        distributed_mesh: Any = None,
        split_sizes: Mapping[Any, Sequence[int]] | None = None,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        ns_algorithm: str = "auto",
        ns_dtype: torch.dtype = torch.float16,
        ns_preconditioner: str | None = None,
        momentum_dtype: torch.dtype | None = None,
        wire_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._settings = Settings(
            distributed_mesh,
            dict(split_sizes or {}),
            ns_algorithm,
            ns_dtype,
            ns_preconditioner,
            momentum_dtype,
            wire_dtype,
        )
        self._plans: list[Plan] | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "use_muon": True,
            "betas": (0.9, 0.999),
            "split_sizes": None,
            "capturable": capturable,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)
        self._check_split_names()
        devices = [local(p).device for group in self.param_groups for p in group["params"]]
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=devices[0] if devices else None)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=self.nonfinite.device)
        self._plans = self._plan()

    # --- parameters and state ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; on every rank, like the constructor's."""
        if isinstance(param_group, dict) and not param_group.get("use_muon", True):
            param_group.setdefault("eps", 1e-8)
        with warnings.catch_warnings():  # torch warns of what is refused below
            warnings.filterwarnings("ignore", message="optimizer contains a parameter group with duplicate parameters")
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            for i, param in enumerate(group["params"]):
                self._check_param(group, param, label(group, i, len(self.param_groups) - 1))
        except BaseException:
            self.param_groups.pop()
            raise
        if group["ns_coefficients"] == "jordan":  # as torch.optim.Muon knows them, which may load this state
            (group["ns_coefficients"],) = COEFFICIENTS["jordan"]
        for param in group["params"]:
            self._fill_state(group, param)
        _place_lr(group)
        self._plans = None

    def _check_param(self, group: dict[str, Any], param: Any, label: str) -> None:
        if not param.is_floating_point():
            raise TypeError(f"Muon needs floating-point parameters, but {label} is {param.dtype}")
        if group["use_muon"] and param.ndim != 2:
            raise ValueError(
                f"Muon orthogonalises matrices, but {label} has shape {tuple(param.shape)}; "
                f"put it into a group with use_muon=False, which runs AdamW"
            )
        if group["use_muon"]:
            self._parts(group, param, label)
            layout_of(param, self._settings.mesh, label)

    def _parts(self, group: dict[str, Any], param: Any, label: str) -> tuple[int, ...]:
        """Row counts of the matrices that a parameter consists of."""
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        given = self._settings.split_sizes
        of_group = group["split_sizes"]
        if isinstance(of_group, Mapping):
            of_group = of_group.get(names.get(id(param)))
        sizes = given.get(param, given.get(names.get(id(param)), of_group))
        if sizes is None:
            return (param.shape[0],)
        if not all(isinstance(size, int) and size > 0 for size in sizes) or sum(sizes) != param.shape[0]:
            raise ValueError(
                f"split_sizes must be positive numbers of rows that add up to {param.shape[0]} for {label}, "
                f"got {tuple(sizes)}"
            )
        return tuple(sizes)

    def _check_split_names(self) -> None:
        known: set[Any] = set()
        for group in self.param_groups:
            if group["use_muon"]:
                known.update(group["params"], group.get("param_names", ()))
        for key in self._settings.split_sizes:
            if key not in known:
                what = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
                raise ValueError(f"split_sizes names {what}, which is no parameter of a Muon group")

    def _fill_state(self, group: dict[str, Any], param: Any) -> None:
        state = self.state[param]
        if not group["use_muon"]:
            for key, value in adamw.new_state(param).items():
                state.setdefault(key, value)
        elif "momentum_buffer" not in state:
            dtype = self._momentum_dtype(param)
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)

    def _momentum_dtype(self, param: Tensor) -> torch.dtype:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        return self._settings.momentum_dtype or wide

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or of torch.optim.Muon; settings that it lacks stay as they are.

        Raises:
            ValueError: its groups, names, algorithms or shapes are not those of the parameters; nothing is loaded then.
        """
        check_state(self.param_groups, state_dict)
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for old, group in zip(before, self.param_groups, strict=True):
            for key, value in old.items():
                group.setdefault(key, value)
            _place_lr(group)
        # torch casts state to the dtype of the parameter; the momentum has one of its own.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for key, (group, param) in zip(saved, params, strict=True):
            given = state_dict["state"].get(key, {})
            if group["use_muon"] and "momentum_buffer" in given:
                buffer = given["momentum_buffer"].to(device=param.device, dtype=self._momentum_dtype(param), copy=True)
                self.state[param]["momentum_buffer"] = buffer
            if "step" in given:  # the fused step wants it there, wherever it was saved
                step = torch.as_tensor(given["step"], dtype=torch.float32)
                self.state[param]["step"] = step.to(local(param).device, copy=True)
            self._fill_state(group, param)
        self._plans = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings, "nonfinite": self.nonfinite,
                "grad_norm": self.grad_norm}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = None

    # --- the step ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]  # a compiled training step breaks here, and goes on
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        copies: Mapping[Any, Tensor] | None = None,
    ) -> Any:
        """Update all parameters that have gradients; on every rank of their meshes.

        Args:
            closure: computes the loss and the gradients anew.
            max_norm: clip the gradients of all parameters together to this norm, as
                `torch.nn.utils.clip_grad_norm_` before the step would, without a pass that writes them. `grad_norm`
                tells their norm before. Where it is not finite, nothing changes on any rank.
            copies: {parameter: tensor of the shape of its local part}, weights in another dtype that are written in the
                same pass. One is right wherever its parameter has a gradient.

        Returns:
            What `closure` gives.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plans is None:
            self._plans = self._plan()
        params = [param for group in self.param_groups for param in group["params"]]
        # In one order on all ranks, also where this one has no row: they may have to send gradients to one another.
        gradients = {param: gradient(param) for param in params if param.grad is not None}
        squares, adam_squares, factor = self._measure(gradients, max_norm)
        step = Step(self.param_groups, self.state, gradients, self._orthogonalise, factor, copies or {})
        meanwhile = [lambda: self._step_adamw(step, adam_squares)] + [_nothing] * (len(self._plans) - 1)
        if not self._plans:
            meanwhile[0]()
        for plan, known, other in zip(self._plans, squares, meanwhile, strict=False):
            self.nonfinite += plan.run(step, known, other)
        return loss

    def _measure(
        self, gradients: Mapping[Any, Tensor], max_norm: float | None
    ) -> tuple[list[Tensor | None], list[Tensor], Tensor | None]:
        """Squared norms of the gradients: of each plan's parts if they are needed, and of AdamW's; the clip factor."""
        assert self._plans is not None
        adam: dict[tuple[torch.device, Groups], list[Tensor]] = {}
        for group in self.param_groups:
            for param in group["params"] if not group["use_muon"] else ():
                parts = adam.setdefault((local(param).device, groups_of(param)), [])
                parts += [gradients[param]] if param in gradients else []
        wanted = [plan.measured or max_norm is not None for plan in self._plans]
        lists = [
            plan.gradient_parts(gradients) if needed else [] for plan, needed in zip(self._plans, wanted, strict=True)
        ]
        found = sums_of_squares([*lists, *adam.values()], self.nonfinite.device)
        muon, rest = found[: len(lists)], found[len(lists) :]
        factor = None
        if max_norm is not None:
            spread = [groups_of(plan.members[0].param) for plan in self._plans] + [groups for _, groups in adam]
            self.grad_norm = total_norm(found, spread, self.nonfinite.device)
            factor = clip_factor(self.grad_norm, max_norm)
        return [x if plan.measured else None for x, plan in zip(muon, self._plans, strict=True)], rest, factor

    def _check_capture(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            for number, group in enumerate(self.param_groups):
                if not (group["capturable"] and isinstance(group["lr"], Tensor)):
                    raise RuntimeError(
                        f"a captured step needs capturable=True and a learning rate in a tensor, "
                        f"but group {number} has capturable {group['capturable']} and lr {group['lr']}"
                    )

    def _orthogonalise(self, matrices: list[Tensor], group: dict[str, Any], scales: Tensor | None) -> list[Tensor]:
        return newton_schulz(
            matrices,
            ns_coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            algorithm=self._settings.ns_algorithm,
            dtype=self._settings.ns_dtype,
            eps=group["eps"],
            preconditioner=self._settings.ns_preconditioner,
            scales=scales,
        )

    def _step_adamw(self, step: Step, squares: list[Tensor]) -> None:
        groups = [group for group in self.param_groups if not group["use_muon"]]
        params = [param for group in groups for param in group["params"]]
        if not params:
            return
        if step.factor is None:
            found = adamw.any_nonfinite(params, squares)
        else:  # one norm for all: what is not finite anywhere is left out everywhere
            found = (~self.grad_norm.isfinite()).to(local(params[0]).device, torch.float32, non_blocking=True)
        for group in groups:
            adamw.step(group, self.state, step.gradients, found, step.factor)
        copied = [param for param in params if param in step.copies]
        if copied:
            torch._foreach_copy_([step.copies[param] for param in copied], [local(param) for param in copied])
        self.nonfinite += found.to(self.nonfinite.device, torch.int64, non_blocking=True)

    def _plan(self) -> list[Plan]:
        """Every matrix to its owner: one plan for each layout, dtype on the wire and device."""
        found: dict[tuple[Layout, torch.dtype, torch.device], tuple[list[Member], list[Block]]] = {}
        for number, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"] if group["use_muon"] else ()):
                name = label(group, i, number)
                layout, row = layout_of(param, self._settings.mesh, name), 0
                wire = torch.float32 if layout.ranks == 1 else self._settings.wire_dtype
                wire = torch.float64 if param.dtype == torch.float64 else wire
                members, blocks = found.setdefault((layout, wire, local(param).device), ([], []))
                for rows in self._parts(group, param, name) if param.numel() else ():
                    members.append(Member(param, number))
                    blocks.append(Block(param.shape[0], row, rows, param.shape[1], self._cost(group, rows, param)))
                    row += rows
        plans = []
        for (layout, wire, device), (members, blocks) in found.items():
            scaled = torch.float64 not in (wire, self._settings.ns_dtype)
            if blocks:
                held = self._settings.ns_dtype if scaled else wire
                plans.append(Plan(members, Exchange(blocks, layout, wire, device), held, scaled))
        return plans

    def _cost(self, group: dict[str, Any], rows: int, param: Tensor) -> float:
        """Operations of its Newton-Schulz."""
        steps = group["ns_steps"]
        restarts = safe_restarts(polynomials(group["ns_coefficients"], steps), self._settings.ns_dtype)
        costs = {
            "gram": newton_schulz_flop(rows, param.shape[1], steps, algorithm="gram", restarts=restarts),
            "standard": newton_schulz_flop(rows, param.shape[1], steps, algorithm="standard"),
        }
        return costs.get(self._settings.ns_algorithm, min(costs.values()))


def _place_lr(group: dict[str, Any]) -> None:
    if group["capturable"] and not isinstance(group["lr"], Tensor) and group["params"]:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=local(group["params"][0]).device)


def _nothing() -> None:
    return None
