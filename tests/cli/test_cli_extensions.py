"""Methods and allocators of other packages at the command line, whole ones and broken ones."""

from tests.support.packages import ALLOCATOR, GOOD, put


def test_what_packages_add_and_what_is_broken_in_them_is_listed(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(put(tmp_path, "more-allocators", GOOD))
    broken = put(tmp_path, "ratios", "1 / 0", name="ratio", group="secateur.methods")
    monkeypatch.syspath_prepend(broken)
    shown = " ".join(run("ls").succeeded().out.split())
    assert "same the same (a test) from more-allocators 2.1 --much of it (default 0.5)" in shown
    assert "method 'ratio' of package ratios 2.1 can't be loaded: ZeroDivisionError" in shown
    helped = run("plan", "--allocator", "same", "--help").succeeded()
    assert "--much FLOAT [same] of it" in " ".join(helped.out.split())
    run("plan", "--help").succeeded()
    run("plan", "demo", "--method", "ratio").refused("ratios 2.1", "ZeroDivisionError", "uninstall")


def test_a_field_named_as_an_option_of_the_command_is_refused(run, tmp_path, monkeypatch):
    double = ALLOCATOR.format(field='samples: int = option(3, "of them")')
    monkeypatch.syspath_prepend(put(tmp_path, "double", double))
    run("plan", "demo", "--allocator", "same").refused("allocator 'same'", "--samples")
