"""Population-based training: members train side by side, and the worst go on from the best one's checkpoint.

After each generation the members are ranked by held-out loss at the constant rate. The lowest ``share`` of
them exploit: each takes the weights, optimizer state and hyper-parameters of one of the highest ``share``,
  and
explores: its hyper-parameters are multiplied by one of the factors (Jaderberg et al. 2017, truncation
selection). At the end the best member's cooldown gives a loss that a whole cell of the same D compares with.

A member whose hyper-parameters changed on the way is no function of them alone: its cell names the cell that
it left (``train.parent``), whose id holds all that came before.
"""

from __future__ import annotations

import dataclasses
import math

from launch.search.points import draw, generator, perturbed
from launch.search.session import Session
from scaling.branches import fork_step, trunk_of
from scaling.config import ConfigError, cell_id, validate_cell
from scaling.grid import entry


@dataclasses.dataclass
class Member:
    """One line of training.

    Attributes:
      point: its hyper-parameters now. parent: cell at whose end they last changed, None before the first
        time.
      last: its newest segment, None before the first. end: updates at that segment's end.
    """

    point: dict
    parent: str | None = None
    last: str | None = None
    end: int = 0


def populate(session: Session) -> None:
    """Population-based training of ``members`` over ``generations``.

    Raises:
      ConfigError: a generation would end within the warm-up.
    """
    s = session.search
    members = [Member(draw(s, "members", m)) for m in range(s["members"])]
    ends = generation_ends(session, members[0].point)
    count = max(1, math.floor(s["share"] * len(members)))
    for g, end in enumerate(ends):
        made = [segment(session, m, end) for m in members]
        points = [m.point for m in members]
        losses = session.ask(made, [e["id"] for e in made], generation=g, steps=end, points=points)
        for member, e in zip(members, made, strict=True):
            member.last, member.end = e["id"], end
        order = sorted(range(len(members)), key=lambda m: losses[m])
        if not math.isfinite(losses[order[0]]):
            session.decide(copied={})
            session.answer = None
            return
        ahead = made[order[0]]  # the answer where the budget ends here: a loss at the constant rate
        session.answer = {
            "point": members[order[0]].point, "tokens": ahead["achieved"]["tokens"],
            "loss": losses[order[0]], "cell": ahead["id"],
        }  # fmt: skip
        if g + 1 < len(ends):
            session.decide(copied=exploit(session, members, losses, order, count, g))
    best = members[order[0]]
    final = cooldown(session, best)
    loss = session.ask([final], [final["id"]], cooldown=order[0])[0]
    tokens = final["achieved"]["tokens"]
    if math.isfinite(loss):  # else the answer stays the one before the cooldown
        session.answer = {"point": best.point, "tokens": tokens, "loss": loss, "cell": final["id"]}


def generation_ends(session: Session, point: dict) -> list[int]:
    """Updates done at the end of each generation; the last is where the final cooldown begins."""
    whole, count = base(session, point), session.search["generations"]
    last, warmup = fork_step(whole), whole["schedule"]["warmup_steps"]
    ends = [round(last * (g + 1) / count) for g in range(count)]
    if ends[0] <= warmup or len(set(ends)) < count:
        raise ConfigError(
            f"search.generations is {count} over {last} updates with a warm-up of {warmup}; the first must "
            "end after the warm-up: use fewer, or more search.tokens"
        )
    return ends


def base(session: Session, point: dict) -> dict:
    """The whole cell of a point, as if it had trained under it from the start."""
    tokens = float(session.search["tokens"])
    return session.cell(point, tokens, (tokens, tokens))


def segment(session: Session, member: Member, end: int) -> dict:
    """The manifest's entry of a member's next generation."""
    cell = trunk_of([base(session, member.point)])
    cell["train"] |= {"steps": end, "parent": member.parent}
    return follow(session, member, cell, {"role": "trunk", "forks": [end]})


def cooldown(session: Session, member: Member) -> dict:
    """The entry of the cooldown that leaves a member at its end."""
    cell = base(session, member.point)
    cell["train"]["parent"] = member.parent
    return follow(session, member, cell, {"role": "branch"})


def follow(session: Session, member: Member, cell: dict, more: dict) -> dict:
    cell = validate_cell(cell)
    made = entry(cell_id(cell), cell, {**session.target(member.point), "tokens": None, "flops": None}) | more
    return made if member.last is None else {**made, "trunk": member.last, "fork": member.end}


def exploit(session: Session, members: list[Member], losses, order, count: int, generation: int) -> dict:
    """Replaces the last members in ``order`` by changed copies of the first; who copied whom, for the record.

    A member that diverged always copies; one that diverged is never copied.
    """
    good = [m for m in order[:count] if math.isfinite(losses[m])]
    poor = [m for m in order if m in order[-count:] or not math.isfinite(losses[m])]
    copied, new = {}, {}
    for m in poor:
        if m in good:
            continue
        rng = generator(session.search["seed"], f"exploit {generation}", m)
        source = good[int(rng.integers(len(good)))]
        of = members[source]
        new[m] = Member(perturbed(session.search, of.point, rng), of.last, of.last, of.end)
        copied[str(m)] = {"from": source, "cell": of.last, "point": new[m].point}
    for m, member in new.items():
        members[m] = member
    return copied
