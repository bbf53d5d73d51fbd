"""A run that is killed: for the tests of resuming."""


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def kill_after(step):
    """For ``on_metrics`` of ``scaling.train``: the run dies when it logs this step or a later one."""

    def on_metrics(row):
        if row["step"] >= step:
            raise Killed

    return on_metrics


def files(folder):
    """The bytes of a cell's folder that a kill must not change."""
    return {p.name: p.read_bytes() for p in (folder.result, folder.metrics, folder.config)}
