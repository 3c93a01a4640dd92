"""Which task an input comes from, decided on frozen features alone, without being told the task.

One file per kind of task model, and the table that finds it by the name a recipe gives.
"""

from llava_cmoe.locators.autoencoder import AutoEncoderLocator
from llava_cmoe.locators.base import Locator
from llava_cmoe.locators.gaussian import GaussianLocator
from llava_cmoe.locators.ppca import PpcaLocator
from llava_cmoe.locators.prototype import PrototypeLocator
from llava_cmoe.locators.vae import ProbabilisticTaskLocator

LOCATORS: dict[str, type[Locator]] = {
    "vae": ProbabilisticTaskLocator,
    "autoencoder": AutoEncoderLocator,
    "ppca": PpcaLocator,
    "gaussian": GaussianLocator,
    "prototype": PrototypeLocator,
}
