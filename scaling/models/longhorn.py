"""Longhorn: Mamba's block around the closed-form step of an online regression."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import selective_scan
from scaling.models import init
from scaling.models.mamba import Mamba


class Longhorn(Mamba):
    """Mamba's block with the recurrence of Liu et al. 2024 (eqs. 8 and 9, algorithm 1).

        S_t = argmin_S |S - S_{t-1}|^2 + beta_t (S k_t - u_t)^2, channel by channel, its diagonal form:
        S_t = (1 - d_t (k_t^2)^T) S_{t-1} + (d_t u_t) k_t^T,  d_t = beta_t / (1 + beta_t |k_t|^2)

    beta = sigmoid(u W_down W_up + dt_bias), zero bias at the start; k and q are Mamba's b and c. Nothing but
    the key forgets.
    """

    def start(self, rngs: nnx.Rngs, channels: int, state: int) -> None:
        self.dt_bias = init.zeros(channels, "heads")

    def scan(self, u_BTR, raw_BTR, b_BTS, c_BTS, segment_ids_BT):
        beta_BTR = jax.nn.sigmoid(raw_BTR)
        norm_BT1 = jnp.sum(jnp.square(b_BTS.astype(jnp.float32)), axis=-1, keepdims=True)
        step_BTR = beta_BTR / (1 + beta_BTR * norm_BT1)
        return selective_scan(u_BTR, step_BTR, b_BTS, c_BTS, segment_ids=segment_ids_BT)[0]
