from __future__ import annotations

from importlib.util import find_spec

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from dlrm_deploy.bench import plot as bench_plot
from dlrm_deploy.bench.plot import plot
from dlrm_deploy.errors import MissingDependencyError, OutputError


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    return figures


def test_two_panels_show_every_engine_over_batch_size_on_log_axes(make_report, tmp_path, drawn):
    plot(make_report(), tmp_path / "out.png")
    throughput, latency = drawn[0].axes
    lines = {line.get_label(): line for line in throughput.lines}
    assert list(lines) == ["PyTorch eager", "onnxruntime + dlrm-deploy"]
    assert list(lines["onnxruntime + dlrm-deploy"].get_xdata()) == [4, 64]
    assert list(lines["onnxruntime + dlrm-deploy"].get_ydata()) == pytest.approx([2000, 2000])
    assert [line.get_label() for line in latency.lines if not line.get_label().startswith("_")] == [
        *lines,
        "99th percentile",
    ]
    for axes in (throughput, latency):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert "batch size" in axes.get_xlabel()
    assert "samples per second" in throughput.get_ylabel()
    assert "milliseconds" in latency.get_ylabel()


def test_the_picture_states_model_threads_cpu_and_calibration(make_report, tmp_path, drawn):
    plot(make_report(), tmp_path / "out.png")
    texts = " ".join(text.get_text() for text in drawn[0].texts) + drawn[0].get_suptitle()
    for fact in (
        "kaggle",
        "2.16 GB",
        "2 threads",
        "Quick 9000",
        "200 GFLOP/s",
        "5 GB/s rows of the batches",
        "torch 2",
    ):
        assert fact in texts
    plot(make_report(calibrated=False), tmp_path / "out.png")
    assert any("not calibrated" in text.get_text() for text in drawn[1].texts)


def test_the_picture_says_when_the_machine_was_not_quiet(make_report, tmp_path, drawn):
    for load in (0.05, 0.4):
        plot(make_report(other_load=load), tmp_path / "out.png")
    quiet, busy = (" ".join(text.get_text() for text in figure.texts) for figure in drawn)
    assert "doubtful" not in quiet
    assert "doubtful: other processes used up to 40% of the machine" in busy


def test_the_file_is_a_png_and_nothing_is_left_beside_it(make_report, tmp_path):
    plot(make_report(), tmp_path / "out.png")
    assert imread(tmp_path / "out.png").shape[2] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_an_unwritable_place_is_an_output_error(make_report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out\.png"):
        plot(make_report(), tmp_path / "file" / "out.png")


def test_without_matplotlib_the_extra_is_named(make_report, tmp_path, monkeypatch):
    assert find_spec("matplotlib") is not None
    monkeypatch.setattr(bench_plot, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"dlrm-deploy\[bench\]"):
        plot(make_report(), tmp_path / "out.png")


def test_peers_and_variants_have_lines_of_their_own(make_report, tmp_path, drawn):
    plot(make_report(ours="onnxruntime[int8,bf16]"), tmp_path / "out.png")
    plot(make_report(ours="openvino-bf16"), tmp_path / "out.png")
    for figure, engine in zip(drawn, ("onnxruntime[int8,bf16]", "openvino-bf16"), strict=True):
        labels = [line.get_label() for line in figure.axes[0].get_lines()]
        assert engine in labels
        styles = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
        assert len(styles) == 2
