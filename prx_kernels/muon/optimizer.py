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
from ..newton_schulz.polynomials import COEFFICIENTS, Coefficients
from . import adamw
from .fitting import Settings, check_capture, check_group, check_state, label, matched
from .norms import Measured, measure
from .owners import gradient, local
from .plan import Plan, Step
from .planning import check_parameter, check_split_names, plans_of


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
        check_split_names(self.param_groups, self._settings)
        devices = [local(p).device for group in self.param_groups for p in group["params"]]
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=devices[0] if devices else None)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=self.nonfinite.device)
        self._plans = plans_of(self.param_groups, self._settings)

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
                check_parameter(group, param, label(group, i, len(self.param_groups) - 1), self._settings)
        except BaseException:
            self.param_groups.pop()
            raise
        if group["ns_coefficients"] == "jordan":  # as torch.optim.Muon knows them, which may load this state
            (group["ns_coefficients"],) = COEFFICIENTS["jordan"]
        for param in group["params"]:
            self._fill_state(group, param)
        _place_lr(group)
        self._plans = None

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
        for group, param, given in matched(self.param_groups, state_dict):
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
        check_capture(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(max_norm, copies or {})
        return loss

    def _update(self, max_norm: float | None, copies: Mapping[Any, Tensor]) -> None:
        """Measure the gradients; then AdamW while the first matrices travel, and Muon plan by plan."""
        if self._plans is None:
            self._plans = plans_of(self.param_groups, self._settings)
        params = [param for group in self.param_groups for param in group["params"]]
        # In one order on all ranks, also where this one has no row: they may have to send gradients to one another.
        gradients = {param: gradient(param) for param in params if param.grad is not None}
        measured = measure(self._plans, self.param_groups, gradients, max_norm, self.nonfinite.device)
        if measured.norm is not None:
            self.grad_norm = measured.norm
        step = Step(self.param_groups, self.state, gradients, self._orthogonalise, measured.factor, copies)
        meanwhile = [lambda: self._step_adamw(step, measured)] + [_nothing] * (len(self._plans) - 1)
        if not self._plans:
            meanwhile[0]()
        for plan, squares, other in zip(self._plans, measured.squares, meanwhile, strict=False):
            self.nonfinite += plan.run(step, squares, other)

    def _step_adamw(self, step: Step, measured: Measured) -> None:
        groups = [group for group in self.param_groups if not group["use_muon"]]
        found = adamw.step_all(groups, step, measured)
        if found is not None:
            self.nonfinite += found.to(self.nonfinite.device, torch.int64, non_blocking=True)

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


def _place_lr(group: dict[str, Any]) -> None:
    if group["capturable"] and not isinstance(group["lr"], Tensor) and group["params"]:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=local(group["params"][0]).device)


def _nothing() -> None:
    return None
