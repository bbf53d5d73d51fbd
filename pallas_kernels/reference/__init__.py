"""Every kernel in plain jnp, float32 or float64: the oracle of the tests."""
