"""Objectives shared by the tests of the loss and of the parallel trainer."""

from treg_megatron.objective import Objective

PLAIN_DPO = Objective(
    loss_type="dpo",
    beta=0.1,
    gamma=0.0,
    label_smoothing=0.0,
    alpha=0.0,
    weight="dynamic",
    weight_margin=True,
    token_rewards="contrastive",
    sft_loss_weight=0.0,
)


VARIANTS = [
    dict(),
    dict(alpha=0.5),
    dict(alpha=0.5, weight="static"),
    dict(alpha=0.5, token_rewards="implicit"),
    dict(label_smoothing=0.1, alpha=0.25),
    dict(sft_loss_weight=0.3),
    dict(loss_type="dpo_norm", beta=5.0, alpha=0.5),
    dict(loss_type="ipo"),
    dict(loss_type="sft"),
    dict(loss_type="simpo", beta=2.0, gamma=0.6),
    dict(loss_type="simpo", beta=2.0, gamma=0.6, alpha=0.5),
    dict(loss_type="simpo", beta=2.0, gamma=0.6, alpha=0.5, weight_margin=False),
]
