"""Exported programs for a framework: instrumented, or taken up again after they were saved or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from .config import HookGranularity, InstrumentationConfig
from .errors import NotInstrumentedError
from .graph.exported import insert_exported, read_spec, skeleton
from .graph.exported_call import ExportedAttachment, InstrumentedProgram, attach_call, outputs_of
from .graph.rewrite import Sampling
from .graph.sites import choose_sites


def rewrite_program(
    program: ExportedProgram, config: InstrumentationConfig, attachment: ExportedAttachment | None
) -> tuple[ExportedAttachment, ExportedProgram]:
    """The program with captures, and the attachment that its modules deliver to."""
    if read_spec(program.call_spec.out_spec) is not None:
        raise ValueError("this exported program has captures already: instrument the original one")
    modules = skeleton(program)
    sites = choose_sites(modules, config)
    gm, changed = insert_exported(program, sites, _sampling(config))
    if attachment is None:
        attachment = ExportedAttachment(modules)
    instrumented = InstrumentedProgram(
        root=gm,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
        attachment=attachment,
        **changed,
    )
    outputs = read_spec(instrumented.call_spec.out_spec)
    assert outputs is not None
    attachment.add_sites(outputs.sites)
    return attachment, instrumented


def attach_program(
    program: Any, config: InstrumentationConfig, attachment: ExportedAttachment | None
) -> tuple[ExportedAttachment, Callable[..., Any]]:
    """A callable of a loaded program, and the attachment that it delivers to."""
    outputs = outputs_of(program)
    if outputs is None:
        raise NotInstrumentedError(
            f"this {type(program).__name__} returns no captures: make its program with instrument_exported"
        )
    if outputs.sampling != _sampling(config):
        raise ValueError(
            f"the program was instrumented with {outputs.sampling or 'whole tensors'}, this configuration has "
            f"{_sampling(config) or 'whole tensors'}"
        )
    if attachment is None:
        described = (
            program if isinstance(program, nn.Module) else type(type(program).__name__, (nn.Module,), {})()
        )
        attachment = ExportedAttachment(described)
    attachment.add_sites(outputs.sites)
    return attachment, attach_call(program, outputs, attachment)


def _sampling(config: InstrumentationConfig) -> Sampling | None:
    if config.granularity is not HookGranularity.SAMPLED_SLICES:
        return None
    return Sampling(config.hook_config.sampling_rate, config.hook_config.seed)
