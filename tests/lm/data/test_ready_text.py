import dataclasses
import json
import subprocess
import sys
import textwrap

SCRIPT = """
    import sys
    for name in ("tokenizers", "datasets", "peft"):  # peft needs tokenizers itself
        sys.modules[name] = None  # importing it fails
    import json
    from memlayers.lm.config import RunConfig
    from memlayers.lm.train import train

    result = train(RunConfig.from_dict(json.loads({config!r})), "run", corpus={corpus!r}, progress=False)
    print(result["training"]["steps"])
"""


def test_a_model_is_trained_from_ready_token_files_without_the_libraries_for_text(tiny_config, tiny_corpus, tmp_path):
    names = [entry["name"] for entry in tiny_corpus.manifest["asked"]["sources"]]
    data = dataclasses.replace(tiny_config.data, sources=tuple(names))
    config = json.dumps(dataclasses.replace(tiny_config, data=data).to_dict())
    script = textwrap.dedent(SCRIPT).format(config=config, corpus=str(tiny_corpus.folder))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tiny_config.training.steps}\n"
