"""What one job may cost: its calls, of all its runs, spend from it and from nothing else."""

from dataclasses import dataclass

from headrace_shared.money import ZERO, NanoUSD


@dataclass(slots=True)
class Allowance:
    """The money of one job, counted by the run that owns it; calls at the same time share it.

    A job is run by one worker at a time, so that no other process has to be asked.
    """

    limit: NanoUSD
    spent: NanoUSD = ZERO
    """What calls cost, may have cost (suspense), or may still cost where an earlier run left them open."""
    held: NanoUSD = ZERO
    """By calls of this run that are under way."""

    def hold(self, amount: NanoUSD) -> NanoUSD:
        """Hold money for a call; return what is missing, and then nothing is held."""
        missing = NanoUSD(self.spent + self.held + amount - self.limit)
        if missing > 0:
            return missing
        self.held = NanoUSD(self.held + amount)
        return ZERO

    def settle(self, amount: NanoUSD, cost: NanoUSD) -> None:
        """Turn what was held for a call into what it cost, or may have cost."""
        self.held = NanoUSD(self.held - amount)
        self.spent = NanoUSD(self.spent + cost)
