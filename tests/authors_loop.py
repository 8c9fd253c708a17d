"""The algorithm of the authors' module, one criterion call per blob, quirks included: the truth of test_compat.py.

A transcription in our own words of what github.com/neuronflow/blob_loss (Kofler et al., arXiv 2205.08209) computes. It
is deliberately naive and keeps the surprises: masking by multiplication (`inf * 0` is NaN), an int32 target first and a
float32 target after *any* exception, the Python int 0 where there is no blob, an UnboundLocalError for weights that
select neither term, a weight that is not applied when the other one is 0, and means of running means without masking.
"""

import torch


def _call(criterion, output, is_blob):
    try:
        return criterion(output, is_blob.int())
    except:  # noqa: E722  (their bare except, on purpose)
        return criterion(output, is_blob.float())


def compute_blob_loss_multi(criterion, network_outputs, multi_label):
    sample_means = []
    for b in range(multi_label.shape[0]):
        ids, output = multi_label[b : b + 1], network_outputs[b : b + 1]
        losses = []
        for blob in torch.unique(ids):
            if blob == 0:
                continue
            keep = ~(ids > 0)  # the background, and negative ids
            keep[ids == blob] = True
            losses.append(_call(criterion, output * keep, ids == blob))
        if losses:
            sample_means.append(sum(losses) / len(losses))
    if not sample_means:
        return 0
    return sum(sample_means) / len(sample_means)


def compute_no_masking_multi(criterion, network_outputs, multi_label):
    running_means = []  # of all samples: pooled, not averaged per sample
    for b in range(multi_label.shape[0]):
        ids, output = multi_label[b : b + 1], network_outputs[b : b + 1]
        losses = []
        for blob in torch.unique(ids):
            if blob != 0:
                losses.append(_call(criterion, output, ids == blob))
            if losses:  # also at id 0, where negative ids came before it
                running_means.append(sum(losses) / len(losses))
    if not running_means:
        return 0
    return sum(running_means) / len(running_means)


def compute_compound_loss(criterion_dict, raw_network_outputs, label, blob_loss_mode=False, masked=True):
    losses = []
    for entry in criterion_dict.values():
        criterion = entry["loss"]
        output = torch.sigmoid(raw_network_outputs) if entry["sigmoid"] == True else raw_network_outputs  # noqa: E712
        if blob_loss_mode == False:  # noqa: E712
            value = criterion(output, label)
        elif blob_loss_mode == True and masked == True:  # noqa: E712
            value = compute_blob_loss_multi(criterion, output, label)
        elif blob_loss_mode == True and masked == False:  # noqa: E712
            value = compute_no_masking_multi(criterion, output, label)
        losses.append(value * entry["weight"])
    return sum(losses)


def compute_loss(blob_loss_dict, criterion_dict, blob_criterion_dict, raw_network_outputs, binary_label, multi_label):
    main_weight, blob_weight = blob_loss_dict["main_weight"], blob_loss_dict["blob_weight"]
    if main_weight > 0:
        main_loss = compute_compound_loss(criterion_dict, raw_network_outputs, binary_label, blob_loss_mode=False)
    if blob_weight > 0:
        blob_loss = compute_compound_loss(blob_criterion_dict, raw_network_outputs, multi_label, blob_loss_mode=True)

    if blob_weight == 0 and main_weight > 0:
        loss, blob_loss = main_loss, 0
    elif main_weight == 0 and blob_weight > 0:
        loss, main_loss = blob_loss, 0
    elif main_weight > 0 and blob_weight > 0:
        loss = main_loss * main_weight + blob_loss * blob_weight
    else:
        loss = main_loss + blob_loss  # UnboundLocalError: at least one of them was never computed
    return loss, main_loss, blob_loss


def get_loss_value(loss):
    return 0 if loss == 0 else loss.item()
