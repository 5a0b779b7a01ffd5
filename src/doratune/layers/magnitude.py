"""Names of the parameters behind m: `magnitude`, or `magnitude_delta` and `magnitude_start` of m = m₀·exp(δ).

transformers' Trainer decays what is not named as a norm or a bias: it compares a parameter's lower-case name with `_norm` and the
like. m is a norm, under a name that does not say so; its lower-case form does. In state dicts and files names are plain strings.
"""


class NormName(str):
    """The name of a norm."""

    def lower(self) -> str:
        return f"{super().lower()}_norm"


MAGNITUDES = {False: (NormName("magnitude"),), True: (NormName("magnitude_delta"), NormName("magnitude_start"))}
"""By `relative`."""
