"""The model as it was after any learned task: a method's tensors from the registry, put back in order.

Where the tensors lie and whether they are intact is `store.py`'s; what they mean is the method's.
"""

from __future__ import annotations

from llava_cmoe.backbones.loading import Backbone
from llava_cmoe.methods import method_of
from llava_cmoe.methods.base import Method
from llava_cmoe.registry.schema import RegistryError, TaskRecord
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe


def build_method(recipe: Recipe, backbone: Backbone) -> Method:
    """A recipe's method on a backbone, with nothing learned yet."""
    return method_of(recipe.method)(recipe.method, backbone.model, backbone.processor, recipe.seed)


def restore_method(recipe: Recipe, backbone: Backbone, registry: Registry, stages: int | None = None) -> Method:
    """The method as it was after its first `stages` stages (all that are learned when absent).

    Raises:
        RegistryError: fewer stages are learned, a file is damaged, or they were learned on another backbone.
    """
    method = build_method(recipe, backbone)
    restore_stages(method, registry, backbone, stages)
    return method


def restore_stages(method: Method, registry: Registry, backbone: Backbone, stages: int | None = None) -> None:
    """Put the first `stages` stages (all when absent) back into a method with nothing learned; errors as above."""
    records = registry.records()
    wanted = len(records) if stages is None else stages
    if wanted > len(records):
        raise RegistryError(f"{registry.run}: {len(records)} stages are learned, not {wanted}")
    for record in records[:wanted]:
        restore_stage(method, registry, record, backbone)


def restore_stage(method: Method, registry: Registry, record: TaskRecord, backbone: Backbone) -> None:
    """Put the next stage back, its files verified against its record."""
    registry.check_backbone(record, backbone.fingerprint)
    quantization = record.settings["backbone"].get("quantization", "none")  # a run older than the setting has no key
    if quantization != backbone.quantization:
        raise RegistryError(
            f"{registry.run}: {record.name} was learned with backbone.quantization {quantization}, this backbone has "
            f"{backbone.quantization}: experts and locators fit the rounded weights that they were learned on; "
            f"set backbone.quantization to {quantization}"
        )
    method.restore(registry.tensors_of(record))
