"""How a task is told from the others by a frozen feature of the prompt."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings


class LocatorSettings(Settings):
    """Probabilistic task locator: a model per task of a frozen feature of the prompt."""

    kind: Literal["vae", "autoencoder", "ppca", "gaussian", "prototype"] = "vae"
    """What a task is modelled by, and hence what an error is: of reconstruction, a density, a distance to the mean."""
    feature: Literal["last", "mean", "vision", "text", "both"] = "last"
    """State of the last prompt token, or mean state of all prompt tokens, of the image's, of all others, or the last
    two side by side, each normalised; `vision` of a prompt without a picture is zeros."""
    layer: int = -1
    """LLM layer whose states are the feature: 0 is the embedding, -1 the last layer."""
    free: bool = False
    """Locate inside the forward pass that answers instead of in one before it: no expert lives below
    experts.first_layer, so what enters layers up to that one is the frozen model's own."""
    hidden: int = Field(512, gt=0)
    """Width of the hidden layers of VAE and auto-encoder."""
    latent: int = Field(64, gt=0)
    """Width of their latent; directions of a task's own in probabilistic PCA (`ppca`)."""
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
    """How many std above the mean of a task's own held-out errors an error no longer fits, so that the base model
    answers; calibrated per task when absent (their 99th percentile, at least 3)."""
    selection: Literal["hard", "soft"] = "hard"
    """The closest task's routers answer alone, or those of the closest few, weighted by softmax(-score / T)."""
    temperature: float = Field(1.0, gt=0)
    """T of soft selection, in units of the score."""
    num_mixed: int = Field(2, gt=0)
    """Tasks that soft selection mixes; fewer where fewer are known."""

    def why_too_few(self, num_rows: int, first: bool) -> str | None:
        """A locator holds two features out at least, for a standard deviation, and fits to one at least."""
        del first
        if max(2, round(num_rows * self.holdout)) < num_rows:
            return None
        return (
            f"a locator is fitted to what locator.holdout ({self.holdout}, at least two rows) leaves of them, which is "
            "nothing; add rows, lower the share, or leave the task out with data.tasks"
        )

    @model_validator(mode="after")
    def _elbo_of_a_vae(self) -> Self:
        if self.error == "elbo" and self.kind != "vae":
            raise ValueError(f"error elbo is the VAE's, kind is {self.kind}; set error: reconstruction or kind: vae")
        return self
