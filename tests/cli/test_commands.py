"""Commands against a stand-in engine: what they read, print and return."""

from __future__ import annotations

import io
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sparsejax.cli import main, story
from sparsejax.cli.main import COMMANDS
from sparsejax.evaluation.policies import ANY_MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS)])
def test_help_is_quick_and_imports_no_jax(argv):
    code = (
        "import sys\nfrom sparsejax.cli import main\n"
        f"try: main({[*argv, '--help']!r})\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    )
    # CPU seconds, because other processes may share the machine; help waits for nothing.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert "usage: sparsejax" in done.stdout


def test_overview_groups_the_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.index("Use a model:") < text.index("generate") < text.index("Look at this machine:")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"sparsejax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_unknown_command_suggests(capsys):
    assert main(["generte"]) == 2
    assert "Did you mean generate?" in capsys.readouterr().err


def test_one_prompt_is_streamed(engine, capsys):
    assert main(["generate", "a b", "--max_tokens=5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "A B \n"
    [(text, params)] = engine.asked
    assert (text, params.max_tokens, params.temperature) == ("a b", 5, 0.0)
    assert engine.closed


def test_many_prompts_keep_their_order(engine, capsys):
    assert main(["generate", "one", "two"]) == 0
    assert capsys.readouterr().out == "[1] one\nONE\n\n[2] two\nTWO\n\n"


def test_text_after_the_separator_is_not_an_option(engine, capsys):
    assert main(["generate", "--", "--top_p"]) == 0
    assert capsys.readouterr().out == "--TOP_P \n"


def test_json_has_one_object_per_prompt(engine, capsys, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('"x"\n{"prompt": "y"}\n\n{"prompt_token_ids": [122]}\n')
    assert main(["generate", "--json", "--file", str(source)]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["outputs"][0]["text"] for r in records] == ["X", "Y", "Z"]
    assert records[0]["outputs"][0]["finish_reason"] == "stop"


def test_text_file_has_one_prompt_per_line(engine, tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("first\n\nsecond\n")
    assert main(["generate", "--file", str(source)]) == 0
    assert [text for text, _ in engine.asked] == ["first", "second"]


def test_stdin_is_one_prompt(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("several\nlines"))
    assert main(["generate"]) == 0
    assert engine.asked[0][0] == "several\nlines"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "no prompt was given"),
        (["generate", "--file", "absent.txt"], "absent.txt"),
        (["generate", "x", "--top-p", "3"], "top_p"),
        (["generate", "x", "--n", "2", "--temperature", "0"], "temperature"),
        (["bench", "--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(engine, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sparsejax: RequestError: ") and error.count("\n") == 1


def test_bad_engine_setting_is_reported_before_jax(capsys):
    assert main(["generate", "x", "--page-size", "7"]) == 2
    assert capsys.readouterr().err.startswith("sparsejax: ConfigError: page_size=7")


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "x"}'])
def test_bad_jsonl(engine, capsys, tmp_path, line):
    source = tmp_path / "prompts.jsonl"
    source.write_text(line)
    assert main(["generate", "--file", str(source)]) == 2
    assert "--file" in capsys.readouterr().err


def test_chat_flag_needs_a_template(engine, capsys):
    engine.tokenizer.chat_template = None
    assert main(["generate", "--chat", "x"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_chat_flag_wraps_the_prompt(engine, capsys):
    assert main(["generate", "--chat", "hi"]) == 0
    assert capsys.readouterr().out == "U:HI; \n"


def talk(monkeypatch, lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", "--system", "short"])


def test_chat_remembers_and_resets(engine, monkeypatch, capsys):
    assert talk(monkeypatch, "hi\nyou\n/reset\nnew\n/system long\nend\n") == 0
    texts = [text for text, _ in engine.asked]
    assert texts[0] == "s:short;u:hi;"
    assert texts[1] == "s:short;u:hi;a:S:SHORT;U:HI; ;u:you;"
    assert texts[2:] == ["s:short;u:new;", "s:long;u:end;"]


def test_chat_survives_a_refused_request(engine, monkeypatch, capsys):
    assert talk(monkeypatch, "refuse\nhi\n/exit\nnever\n") == 0
    assert "this prompt is refused" in capsys.readouterr().err
    assert [text for text, _ in engine.asked] == ["s:short;u:refuse;", "s:short;u:hi;"]


def test_chat_interrupt_stops_the_answer_only(engine, monkeypatch, capsys):
    engine.interrupt_after = 1
    assert talk(monkeypatch, "one two three\nhi\n") == 0
    assert "(stopped)" in capsys.readouterr().out
    assert engine.asked[1][0] == "s:short;u:hi;"


def test_interrupted_command_returns_130(engine, capsys):
    engine.interrupt_after = 0
    assert main(["generate", "x"]) == 130
    assert engine.closed


@pytest.mark.parametrize("every", [False, True])
def test_demo_prints_rates_memory_policies_and_next_steps(engine, capsys, every):
    assert main(["demo", "--all"] if every else ["demo"]) == 0
    text = capsys.readouterr().out
    for part in ("of 8 answers are right", "tokens/s", "at most: 7.0 KiB", "4.0 MiB", "What to try next"):
        assert part in text
    assert "A document of 768 tokens" in text and "read by a step" in text
    told = [policy.label for group in story.policies(every).values() for policy in group]
    for label in told:
        assert re.search(rf"^  {label} +0 of 4: \[", text, re.M)
    assert {label.split()[0] for label in told} == set(ANY_MODEL if every else story.FEW)
    assert len(engine.asked) == 2 * 8 + 1 + len(told) * (4 + 1)


def test_demo_under_one_policy_tells_no_story(engine, capsys):
    assert main(["demo", "--sparsity", "quest"]) == 0
    assert "every line a fact" not in capsys.readouterr().out
    assert len(engine.asked) == 2 * 8 + 1


def test_demo_needs_a_tokenizer(engine, capsys):
    engine.tokenizer = None
    assert main(["demo"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
