"""Coefficients that the run itself moves: of the entropy bonus and of the KL. Host side; their state is in every checkpoint."""

from jaxreason import config as cfg
from jaxreason.errors import present
from jaxreason.losses.policy import adapt_entropy_coef, adapt_kl_coef


class Bonus:
    """The entropy bonus's coefficient from step to step (``losses.policy.adapt_entropy_coef``); None: not adaptive.

    A step's own entropy is known once it has run, so the one before it decides.
    """

    def __init__(self, settings: cfg.Entropy):
        self._settings, self._carried = settings, settings.coef
        self.now = None if settings.target is None else settings.coef

    def after(self, entropy: float | None) -> dict[str, float]:
        """Takes this step's entropy; returns the coefficient that the step used, as a metric."""
        used, target = self.now, self._settings.target
        if used is None or target is None:
            return {}
        measured = present(entropy, "the metric entropy")
        _, self._carried = adapt_entropy_coef(self._carried, measured, target, self._settings.delta)
        self.now = self._carried if measured <= target else 0.0
        return {"entropy_coef": used}

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {} if self.now is None else {"entropy_now": self.now, "entropy_carried": self._carried}

    def restore(self, state: dict) -> None:
        """From a checkpoint."""
        if self.now is not None:
            self.now, self._carried = state["entropy_now"], state["entropy_carried"]


class Leash:
    """The KL's coefficient from step to step (``losses.policy.adapt_kl_coef``); None: not adaptive."""

    def __init__(self, settings: cfg.Kl):
        self._settings = settings
        self.now = None if settings.target is None else settings.coef

    def after(self, kl: float | None) -> dict[str, float]:
        """Takes this step's KL, nats a token; returns the coefficient that the step used, as a metric."""
        used, target = self.now, self._settings.target
        if used is None or target is None:
            return {}
        self.now = adapt_kl_coef(used, present(kl, "the metric kl"), target, self._settings.gain)
        return {"kl_coef": used}

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {} if self.now is None else {"kl_coef": self.now}

    def restore(self, state: dict) -> None:
        """From a checkpoint."""
        if self.now is not None:
            self.now = state["kl_coef"]


class Adaptive:
    """Both."""

    def __init__(self, config: cfg.GrpoConfig):
        self._bonus, self._leash = Bonus(config.entropy), Leash(config.kl)

    @property
    def now(self) -> dict[str, float]:
        """Those that are adaptive, by the field of ``Batch`` that holds them."""
        both = {"entropy_coef": self._bonus.now, "kl_coef": self._leash.now}
        return {name: value for name, value in both.items() if value is not None}

    def after(self, record: dict[str, float]) -> dict[str, float]:
        """Takes a step's metrics; returns the coefficients that it used, as metrics.

        A step all of whose updates were skipped measured nothing: the coefficients stay.
        """
        if "loss" not in record:
            return {}
        return self._bonus.after(record.get("entropy")) | self._leash.after(record.get("kl"))

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return self._bonus.state() | self._leash.state()

    def restore(self, state: dict) -> None:
        """From a checkpoint."""
        self._bonus.restore(state)
        self._leash.restore(state)
