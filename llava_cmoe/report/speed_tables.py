"""The sections of docs/results.md about speed: costs of a step by variant and by the number of tasks, of locating."""

from __future__ import annotations

from pathlib import Path

from llava_cmoe.report.page_parts import Document, missing, named, pictures, read_document
from llava_cmoe.report.tables import markdown


def steps_section(results: Path) -> str:
    """What a training step, a prefill and a decoding step cost by variant, and the ratios that have a bar."""
    path = results / "speed_steps.json"
    if not path.exists():
        return missing("Cost of a step", path)
    found = read_document(path)
    text = (
        "`cmoe_E` are E experts of rank 8 on the FFNs, two of which a token uses and two of which learn "
        "(`all_learn`: all of them); `lora_R` is stock PEFT of rank R on the same linears, `everywhere` on all linears "
        "of the LLM; `moelora_128` is CoIN's MoELoRA on all linears, and `loop_128` the same sizes in the form that "
        "this field usually has, a loop over experts and a dense gate per linear."
    )
    rows = [
        [
            name,
            f"{cost['trained_parameters'] / 1e3:,.0f}",
            *(f"{1000 * cost[part]:.1f}" for part in ("step", "prefill", "decoding")),
            str(cost["operations"]),
        ]
        for name, cost in found["costs"].items()
    ]
    headings = ("variant", "trained (thousands)", "step (ms)", "prefill (ms)", "decoding step (ms)", "its operations")
    ratios = [
        [
            *(name, f"{one['median']:.2f}", f"{one['lower_quartile']:.2f} to {one['upper_quartile']:.2f}"),
            *(f"{one['at_most']:.2f}", "yes" if one["median"] <= one["at_most"] else "no"),
        ]
        for name, one in found["ratios"].items()
    ]
    parts = (
        *("## Cost of a step", text, markdown(headings, rows, num_text_columns=1)),
        "Ratios within a turn, against the bars that were set for them:",
        markdown(("ratio", "median", "quartiles", "at most", "met"), ratios, num_text_columns=1),
        named(path, _facts(found)),
    )
    return "\n\n".join(parts)


def tasks_section(results: Path) -> str:
    """What an answer costs after ever more tasks."""
    path = results / "speed_tasks.json"
    if not path.exists():
        return missing("Cost against the number of tasks", path)
    found = read_document(path)
    text = (
        "A batch that asks for as many different tasks as it has rows, after 1 to 300 tasks that each grew everywhere "
        "and whose routers know four older experts (`probe.old_experts: 4`)."
    )
    rows = [
        [
            name,
            *(f"{1000 * cost[part]:.1f}" for part in ("prefill", "decoding")),
            *(f"{found['to_one_task'][name][part]['median']:.2f}" for part in ("prefill", "decoding")),
            str(cost["operations"]),
        ]
        for name, cost in found["costs"].items()
    ]
    headings = ("tasks", "prefill (ms)", "decoding step (ms)", "prefill / one task", "decoding / one task")
    parts = (
        *("## Cost against the number of tasks", text),
        markdown((*headings, "operations of a decoding step"), rows, num_text_columns=1),
        *pictures(results, {"speed_tasks.png": "seconds of a prefill and a decoding step against the number of tasks"}),
        named(path, _facts(found)),
    )
    return "\n\n".join(parts)


def locating_section(results: Path) -> str:
    """What finding the task adds to a prefill, and what batches gain."""
    path = results / "speed_locating.json"
    if not path.exists():
        return missing("Locating and batches", path)
    found = read_document(path)
    text = (
        "A prefill that is told the task (`oracle`), one that finds it on its way (`free`) and one after a pass that "
        "does (`twice`, or `located` where nothing else is possible); and answers of four tokens: "
        f"{found['answers_a_second']['batch']:.1f} a second in batches of {found['batch'][0]} prompts of all tasks, "
        f"{found['answers_a_second']['single']:.1f} one by one, {found['batch_to_single']:.1f} times as many."
    )
    return "\n\n".join(("## Locating and batches", text, _routes(found), named(path, _run_facts(found))))


def _routes(found: Document) -> str:
    rows = [
        [route, f"{found['seconds'][route]:.3f}", f"{found['ratio_to_oracle'][route]:.3f}"]
        for route in found["seconds"]
    ]
    return markdown(["route", "prefill (seconds)", "ratio to oracle"], rows, num_text_columns=1)


def _run_facts(found: Document) -> str:
    return (
        f"run {found['run']}; medians of {found['repetitions']} repetitions, a batch of "
        f"{' by '.join(map(str, found['batch']))} tokens, {found['tasks']} tasks, first layer with experts "
        f"{found['first_layer']} of {found['llm_layers']}, {found['device']}, {found['threads']} thread(s)"
    )


def _facts(found: Document) -> str:
    load = found["load"]
    return (
        f"model {found['model']}, {found['parameters'] / 1e6:.0f} million weights ({found['weights'][:12]}), "
        f"{found['dtype']}, {load['batch_size']} rows of {load['row_tokens']} tokens, medians of {load['turns']} "
        f"turns, {found['device']}, {found['threads']} thread(s), torch {found['versions']['torch']}"
    )
