"""What a sweep may set a key of a training config to: a range, or one of some choices."""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, model_validator

from contracts.config import Config


class Between(Config):
    """A range. Two whole ends without log give whole numbers."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> "Between":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low} and high {self.high}: the lower end first, and above 0 where log is true")
        return self

    def distribution(self) -> BaseDistribution:
        if isinstance(self.low, int) and isinstance(self.high, int) and not self.log:
            return IntDistribution(self.low, self.high)
        return FloatDistribution(self.low, self.high, log=self.log)

    def some(self) -> list[Any]:
        return [self.low, self.high]

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


class OneOf(Config):
    choices: tuple[bool | int | float | str | None, ...] = Field(min_length=2)

    def distribution(self) -> BaseDistribution:
        return CategoricalDistribution(self.choices)

    def some(self) -> list[Any]:
        return list(self.choices)

    def holds(self, value: Any) -> bool:
        return value in self.choices
