"""The table of metrics: every metric that is reported has a description."""

from modeling_vitreg.metrics import DEPTH_ERRORS, METRICS


def test_every_reported_metric_is_described():
    reported = {"top1", "top5", "mean_iou", "mean_accuracy", "pixel_accuracy", "corloc", *DEPTH_ERRORS}
    assert reported <= set(METRICS)


def test_errors_fall_and_shares_rise():
    for name, metric in METRICS.items():
        is_error = name in {"rmse", "abs_rel", "log10", "rmse_log", "silog", "sq_rel"}
        assert metric.higher_is_better != is_error, name
        assert (metric.unit == "%") == (not is_error), name
