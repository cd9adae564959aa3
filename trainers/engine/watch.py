"""Whether a node is about to be taken away."""

from trainers.engine.context import Context, from_first

LOOK_S = 5.0  # between two looks: Google gives a spot node 30 seconds' notice
MOST = 20  # steps between two looks, however fast they are


class Watch:
    """Every rank asks after every step. A look is a round trip between them; rank 0's clock says for all at which step the next is."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.known = ctx, frozenset[str]()
        self.steps, self.seconds, self.until = 0, 0.0, 1  # since the last look; so many steps after which is the next

    def announced(self, seconds: float) -> bool:
        """True once an announcement, on all ranks after the same step. seconds: what this step took."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        if self.steps < self.until:
            return False
        self.until = from_first(min(MOST, max(1, int(LOOK_S * self.steps / max(self.seconds, 1e-9)))), self.ctx)
        self.steps, self.seconds = 0, 0.0
        leaving = frozenset(self.ctx.leaving())
        new, self.known = leaving - self.known, self.known | leaving
        return bool(new)
