"""Where arrays lie, as the model says it: on one device nothing is to be said."""


class Places:
    """Where arrays lie on one device: where they are. ``scaling.mesh.OnMesh`` has the same methods."""

    def rows(self, x):
        """An array whose first axis is the batch's rows, such as the residual stream [B, T, D]."""
        return x

    def to_experts(self, x):
        """What experts are given, [B, E, C, D]: each expert's where its weights are."""
        return x

    def from_experts(self, x):
        """What experts have made, [B, E, C, D]: each row's where the row is."""
        return x

    def table(self, x):
        """The token table [V, D], about to be looked up."""
        return x


HERE = Places()
