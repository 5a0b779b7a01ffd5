"""The names of the protocols, and which of them a setting asks for."""

PROTOCOLS = ("generate", "likelihood", "paper")
CHOICES = {"both": PROTOCOLS[:2], "all": PROTOCOLS}
BOTH = CHOICES["both"]
"""What is scored unless asked otherwise."""


def protocols_of(choice: str) -> tuple[str, ...]:
    """`both`, `all`, or one protocol's name."""
    return CHOICES.get(choice, (choice,))
