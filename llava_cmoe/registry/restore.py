"""The model as it was after any learned task: a method's tensors from the registry, put back in order.

Where the tensors lie and whether they are intact is `store.py`'s; what they mean is the method's.
"""

from __future__ import annotations

from llava_cmoe.backbones.loading import Backbone
from llava_cmoe.merging.merge_map import StandIns
from llava_cmoe.merging.store import Merges
from llava_cmoe.methods import METHODS
from llava_cmoe.methods.base import Method
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe


def build_method(recipe: Recipe, backbone: Backbone) -> Method:
    """A recipe's method on a backbone, with nothing learned yet."""
    return METHODS[recipe.method.name](recipe.method, backbone.model, backbone.processor, recipe.seed)


def restore_method(recipe: Recipe, backbone: Backbone, registry: Registry, stages: int | None = None) -> Method:
    """The method as it was after its first `stages` stages (all that are learned when absent).

    Raises:
        RegistryError: fewer stages are learned, a file is damaged, or they were learned on another backbone.
    """
    records = registry.records()
    wanted = len(records) if stages is None else stages
    if wanted > len(records):
        raise RegistryError(f"{registry.run}: {len(records)} stages are learned, not {wanted}")
    method = build_method(recipe, backbone)
    for record in records[:wanted]:
        restore_stage(method, registry, record.index, backbone)
    return method


def restore_stage(method: Method, registry: Registry, index: int, backbone: Backbone) -> None:
    """Put the next stage back, verified against its record."""
    record = registry.records()[index]
    registry.check_backbone(record, backbone.fingerprint)
    quantization = record.settings["backbone"].get("quantization", "none")  # a run older than the setting has no key
    if quantization != backbone.quantization:
        raise RegistryError(
            f"{registry.run}: {record.name} was learned with backbone.quantization {quantization}, this backbone has "
            f"{backbone.quantization}: experts and locators fit the rounded weights that they were learned on; "
            f"set backbone.quantization to {quantization}"
        )
    method.restore(registry.load(index))


def restore_merge(method: Method, registry: Registry, number: int) -> None:
    """Leave out of a restored method the experts that merge `number` leaves out, for good.

    Raises:
        RegistryError: no such merge, or it was found for other learned tasks.
    """
    record = Merges(registry).load(number)
    assert isinstance(method, Cmoe), "only a run with a pool of experts has merges"
    for site, of_E in record.stand_ins.items():
        method.host.banks[site].merge(StandIns(of_E, record.shares[site]))
