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
    values=None,
    sft_loss_weight=0.0,
    token_values="regularizer",
    token_weight="linear",
    token_weight_range=[0.7, 1.3],
    token_share=0.3,
    token_decay=0.98,
)


#: values of tokens inside the margin, on DPO, length-normalised DPO and SimPO
TOKENS_IN_THE_MARGIN = [
    dict(token_values="margin", **rule, **loss)
    for rule in (
        dict(token_weight="linear", alpha=0.5),
        dict(token_weight="linear", alpha=0.5, token_rewards="implicit"),
        dict(token_weight="importance", alpha=1.0),
        dict(token_weight="select"),
        dict(token_weight="decay", token_decay=0.8),
        dict(token_weight="confident"),
    )
    for loss in (dict(), dict(loss_type="dpo_norm", beta=5.0), dict(loss_type="simpo", beta=2.0, gamma=0.6))
    if (rule.get("token_rewards"), loss.get("loss_type")) != ("implicit", "simpo")
]

#: T-REG and the losses it is most used with
WITH_REGULARIZER = [
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

VARIANTS = [
    *WITH_REGULARIZER,
    dict(loss_type="robust", label_smoothing=0.1),
    dict(loss_type="hinge"),
    dict(loss_type="exo", label_smoothing=0.01),
    dict(loss_type="nca"),
    dict(loss_type="apo_zero"),
    dict(loss_type="apo_down"),
    *TOKENS_IN_THE_MARGIN,
]
