"""Every setting of a run, validated once: what it means stands beside it, with its unit.

Settings are values: no tensor, module or open file lives here. `recipes.py` reads them from YAML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RecipeError(ValueError):
    """A recipe or task sequence that cannot be used; the message names the key and the fix."""


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataSettings(Settings):
    """Which task sequence is learned, and from where."""

    sequence: str = "data_configs/pocket.yaml"
    """Task sequence as YAML: a path, or the name of one in `data_configs/` (`pocket`, `coin`)."""
    root: Path = Path("runs/data/pocket")
    """Folder in CoIN's layout that holds the instruction files and `cl_dataset/`."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to learn, in this order; all tasks of the sequence when absent."""
    train_rows: int | None = Field(None, gt=0)
    """Use only this many training rows per task (seeded draw); all when absent."""
    eval_rows: int | None = Field(None, gt=0)
    """Use only this many evaluation rows per task (seeded draw); all when absent."""
    keep_encoded: bool = False
    """Keep encoded rows in memory after their first use: for small data (85 kB a row at 84 pixels, 1.3 MB at 336)."""
    workers: int = Field(0, ge=0)
    """Processes that open and encode the rows of the next batches while one is trained on; with 0, training waits for
    each. They change no result, and a run may go on with others."""
    feature_store: Path | None = None
    """Folder that keeps the features which locators read, so that no run reads them from the same model twice: 16 kB a
    row at width 4096; none when absent. Changes no result, and a run may go on with another."""
    max_pixels: int | None = Field(None, gt=0)
    """A square picture of more pixels is made smaller before the backbone's processor gets it: for processors that
    make more tokens of a larger picture, and to resize large photographs only once. As they are when absent."""


Name = Annotated[str, Field(min_length=1)]


class SiteSettings(Settings):
    """Where experts may live in the LLM of a backbone whose names are not Llama's."""

    layers: Name
    """Path of the list of LLM layers from the model's root, such as `transformer.h`."""
    ffn: Name
    """Path of the FFN inside a layer, such as `mlp`."""
    ffn_linears: tuple[Name, ...] = Field(min_length=1)
    """Paths of the FFN's linears inside it; the first one reads the FFN's own input, as routers do."""
    attention_linears: tuple[Name, ...] = ()
    """Paths of the attention's linears inside a layer; methods that adapt every linear use them."""


class BackboneSettings(Settings):
    """The frozen model that knowledge is added to."""

    path: str = "pocket"
    """Hugging Face model folder or name, or `pocket` for the small LLaVA that ships with this package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision the frozen weights are loaded in; that in which the quantized ones compute."""
    quantization: Literal["none", "8bit", "nf4"] = "none"
    """Bits of the LLM's frozen linears, by bitsandbytes: 8 (LLM.int8) or 4 (NF4, QLoRA's); no other weight is touched.
    With 8bit the last digits of an answer depend on its batch, as outliers are looked for in all of it."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel; on a CPU with short samples `eager` trains faster (a fused backward takes thrice as long).
    `flash_attention_2` needs the package flash-attn and a GPU."""
    sites: SiteSettings | None = None
    """Names of the LLM's layers and linears; Llama's, which most LLMs share, when absent."""

    @model_validator(mode="after")
    def _flash_in_half(self) -> Self:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention flash_attention_2 computes in 16 bits, dtype is float32; set dtype: bfloat16")
        return self


class ExpertSettings(Settings):
    """LoRA experts and their routers (METHOD: y = W0 x + sum_e gate_e * alpha/rank * B_e A_e x)."""

    rank: int = Field(64, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(128.0, gt=0)
    """LoRA scale: an expert's output is multiplied by alpha / rank."""
    first_layer: int = Field(0, ge=0)
    """Lowest LLM layer, from 0, whose FFN may hold experts; says nothing of `also_in`."""
    also_in: tuple[Literal["vision", "projector"], ...] = ()
    """Where experts may live besides the LLM: in the vision encoder's FFNs, in the projector; probed like any layer."""
    num_first: int = Field(2, gt=0)
    """Experts per site for the first task (it has no pool and is not probed)."""
    top_k: int = Field(2, gt=0)
    """Experts a token uses at a site; fewer where fewer exist."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision experts are held and learned in; routers keep float32. bfloat16 halves their memory, and loses updates
    below 1/256 of a weight, as small learning rates make them."""
    head_start: float = Field(6.0, ge=0)
    """Logit by which a new router starts in favour of the task's own experts, at the task's mean token. With 0 its
    tokens begin spread over the whole pool, of which ever less can learn: the later a task comes, the worse."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the balance loss n * sum_e F_e P_e, averaged over sites."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if len(set(self.also_in)) < len(self.also_in):
            raise ValueError(f"also_in names a place twice: {', '.join(self.also_in)}; name each once")
        return self


class ProbeSettings(Settings):
    """Probe-guided knowledge extension: where does the new task need experts?"""

    fraction: float = Field(0.1, gt=0, le=1)
    """Share of the task's training rows that probing reads."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of those rows kept for counting; the others train the probes."""
    alpha: float = Field(0.25, ge=0)
    """Threshold tau = mean - alpha * std of activation frequencies (Eq. 2); larger grows more layers."""
    scope: Literal["layer", "global", "all", "none", "random"] = "layer"
    """Mean and std over the experts of one layer, or over the layers' probe frequencies; or, as controls of what
    probes are good for, a threshold that all layers pass, or none does, or as many layers as `global` chooses, drawn
    at random."""
    max_new_experts: int = Field(1, gt=0)
    """Experts added to a chosen layer."""
    init: Literal["most_used", "probe", "lora"] = "most_used"
    """Start of the new experts: copies of the most used one while probing, the probes themselves, or fresh LoRA."""
    clone_noise: float = Field(0.0, ge=0)
    """Gaussian noise on a copied expert, in standard deviations of each of its matrices."""
    counted: Literal["all", "answer"] = "all"
    """Tokens whose experts are counted: all that are not padding, or those of the answers."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the balance loss while probing; 0 shows how much of the probes' use it causes."""
    learning_rate: float | None = Field(None, gt=0)
    """Learning rate while probing; the training stage's when absent."""
    batch_size: int | None = Field(None, gt=0)
    """Samples per step and process while probing, before accumulation; the training stage's when absent."""


class LocatorSettings(Settings):
    """Probabilistic task locator: a model per task of a frozen feature of the prompt."""

    kind: Literal["vae", "autoencoder", "gaussian", "prototype"] = "vae"
    """What a task is modelled by, and hence what an error is: of reconstruction, a density, a distance to the mean."""
    feature: Literal["last", "mean", "vision", "text"] = "last"
    """State of the last prompt token, or mean state of all prompt tokens, of the image's, or of all others; `vision`
    of a prompt without a picture is zeros."""
    layer: int = -1
    """LLM layer whose states are the feature: 0 is the embedding, -1 the last layer."""
    free: bool = False
    """Locate inside the forward pass that answers instead of in one before it: no expert lives below
    experts.first_layer, so what enters layers up to that one is the frozen model's own."""
    hidden: int = Field(512, gt=0)
    """Width of the hidden layers of VAE and auto-encoder."""
    latent: int = Field(64, gt=0)
    """Width of their latent."""
    beta: float = Field(1e-3, ge=0)
    """Weight of the VAE's KL term."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam learning rate."""
    epochs: int = Field(20, gt=0)
    """At most this many passes over the task's features."""
    patience: int = Field(3, gt=0)
    """Stop after this many epochs without a lower held-out error."""
    shrinkage: float | None = Field(None, gt=0, le=1)
    """Weight of the scaled identity in the Gaussian's covariance; computed after Ledoit and Wolf when absent."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the features kept out of fitting; their errors give the task's mean and std."""
    error: Literal["reconstruction", "elbo"] = "reconstruction"
    """Error of the VAE at the mean latent: reconstruction alone, or the negative ELBO (plus beta times KL)."""
    score: Literal["z", "raw"] = "z"
    """What tasks are compared by: errors in units of the task's own held-out mean and std, or errors as they are."""
    unseen_threshold: float | None = None
    """Lowest score above which no task fits and the base model answers; calibrated per task when absent
    (99th percentile of its own held-out scores, at least 3 std above their mean)."""
    selection: Literal["hard", "soft"] = "hard"
    """The closest task's routers answer alone, or those of the closest few, weighted by softmax(-score / T)."""
    temperature: float = Field(1.0, gt=0)
    """T of soft selection, in units of the score."""
    num_mixed: int = Field(2, gt=0)
    """Tasks that soft selection mixes; fewer where fewer are known."""

    @model_validator(mode="after")
    def _elbo_of_a_vae(self) -> Self:
        if self.error == "elbo" and self.kind != "vae":
            raise ValueError(f"error elbo is the VAE's, kind is {self.kind}; set error: reconstruction or kind: vae")
        return self


class ZeroShotSettings(Settings):
    """The backbone as it is; learns nothing."""

    name: Literal["zero_shot"] = "zero_shot"


class SequentialLoraSettings(Settings):
    """One LoRA adapter (stock PEFT), trained on task after task."""

    name: Literal["sequential_lora"] = "sequential_lora"
    rank: int = Field(128, gt=0)
    """LoRA rank."""
    alpha: float = Field(256.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class JointSettings(SequentialLoraSettings):
    """One LoRA adapter trained on the union of all tasks: the upper bound."""

    name: Literal["joint"] = "joint"  # type: ignore[assignment]


class MoeLoraSettings(Settings):
    """CoIN's MoELoRA: experts of rank r/K in every linear, a dense softmax gate per token, shared by all tasks."""

    name: Literal["moelora"] = "moelora"
    rank: int = Field(128, gt=0)
    """Total LoRA rank of a linear, split evenly over its experts."""
    alpha: float = Field(256.0, gt=0)
    """LoRA scale."""
    num_experts: int = Field(8, gt=0)
    """Experts per linear."""

    @model_validator(mode="after")
    def _split_evenly(self) -> Self:
        if self.rank % self.num_experts:
            raise ValueError(f"rank {self.rank} cannot be split evenly over {self.num_experts} experts")
        return self


class CmoeSettings(Settings):
    """LLaVA-CMoE: probe-guided growth of FFN experts, routers per task, a probabilistic task locator."""

    name: Literal["cmoe"] = "cmoe"
    experts: ExpertSettings = ExpertSettings()
    """Experts and routers."""
    probe: ProbeSettings = ProbeSettings()
    """Where to grow."""
    locator: LocatorSettings = LocatorSettings()
    """Which task an input belongs to."""

    @model_validator(mode="after")
    def _located_below_experts(self) -> Self:
        layer, first = self.locator.layer, self.experts.first_layer
        if self.locator.free and not 0 <= layer <= first:
            raise ValueError(
                f"locator.free needs a state that no expert has touched, and locator.layer is {layer} where "
                f"experts.first_layer is {first}; set locator.layer to 0 to {first}, or locator.free: false"
            )
        if self.locator.free and self.experts.also_in:
            raise ValueError(
                "locator.free finds the plan in a state of the LLM; experts in the vision encoder or the projector "
                "need it before, and with them that state is no longer the frozen model's; leave experts.also_in "
                "empty, or set locator.free: false"
            )
        return self


MethodSettings = Annotated[
    ZeroShotSettings | SequentialLoraSettings | JointSettings | MoeLoraSettings | CmoeSettings,
    Field(discriminator="name"),
]


class TrainingSettings(Settings):
    """One stage of training; passed on to `transformers.TrainingArguments`."""

    batch_size: int = Field(16, gt=0)
    """Samples per optimizer step and process, before accumulation."""
    accumulation: int = Field(1, gt=0)
    """Batches per optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the task's training rows."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps spent warming up; cosine decay follows."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    optimizer: Literal["adamw", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """AdamW, or bitsandbytes': its moments in 8 bits (2 bytes a trained parameter instead of 8), or paged out to the
    CPU where a GPU's memory runs short; on a CPU a paged one is not paged."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 turns clipping off."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of forward and backward (bf16 is autocast)."""
    max_length: int = Field(2048, gt=0)
    """Longest sample in tokens; a longer one is an error before training starts."""
    checkpoint_steps: int | None = Field(None, gt=0, multiple_of=5)
    """Optimizer steps between two checkpoints inside a stage, a multiple of 5 (losses are logged so often); none when
    absent: a killed stage is then learned again from its start."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer, and compute the layer again for its gradients: less memory, a third more time,
    the same gradients."""
    group_by_length: bool = False
    """A step reads rows of like length, and rows with a picture apart from those without: less padding to compute."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    """Where losses are reported while training: TensorBoard (files in RUN/logs), or a service; TensorBoard where it is
    installed when absent, nowhere with []. Changes no result, and a run may go on with another."""


class JudgeSettings(Settings):
    """An LLM that judges answers (scorer `llm_judge`), behind any OpenAI-compatible endpoint."""

    model: str = Field(min_length=1)
    """Its name at the endpoint; name a dated version, as what an endpoint serves under a name changes."""
    url: str = "http://localhost:8000/v1"
    """The endpoint; its key is read from OPENAI_API_KEY in the environment and never written down."""
    seed: int = 0
    """Sent with every question; most servers answer alike for it, none promises to."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for one verdict."""


class EvaluationSettings(Settings):
    """How finished tasks are measured."""

    batch_size: int = Field(32, gt=0)
    """Samples per generation batch and process."""
    routes: tuple[Literal["located", "oracle", "random"], ...] = Field(("located",), min_length=1)
    """Which routes are measured; the first one is the headline."""
    limit: int | None = Field(None, gt=0)
    """Ask only a stratified subset of this many questions per task, and mark every result so; all when absent."""
    subset_seed: int = 0
    """Seed of that subset; not the run's, so that runs of several seeds are asked the same questions."""
    protocol: Literal["strict", "coin"] = "strict"
    """Scoring rules of the headline: what should be measured, or CoIN's released scripts with their accidents. What the
    other one makes of the same answers is stated beside it."""
    judge: JudgeSettings | None = None
    """The LLM that tasks with scorer `llm_judge` ask; none when absent, and such a task is then refused."""


class Recipe(Settings):
    """A whole run: one method learns one sequence from one seed."""

    run: Path
    """Output directory of the run."""
    seed: int = 0
    """Seed of everything random in the run."""
    data: DataSettings = DataSettings()
    """What is learned."""
    backbone: BackboneSettings = BackboneSettings()
    """What is frozen."""
    method: MethodSettings
    """How it is learned."""
    training: TrainingSettings = TrainingSettings()
    """One stage of training."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How it is measured."""
