"""deploy/ and `fp4tune facts`: by the real validators where they are installed, and really run."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import BUCKET, ENVIRONMENT, put, rows_for
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.cache import facts, facts_text, publish, quarantine, quarantine_store, reader, state
from fp4tune.cache.errors import StateError
from fp4tune.cache.rows import Environment
from fp4tune.daemon import ask
from fp4tune.daemon import config as configuring
from fp4tune.errors import printable

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
MANIFESTS = ("fp4tune.yaml", "readiness.yaml", "engine-pod.yaml")
RULES = DEPLOY / "prometheus" / "fp4tune.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "fp4tune.json"


def tool(name: str) -> str:
    """Where a validator is; the test is skipped where it is not installed."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    found = shutil.which(name) or (beside if os.access(beside, os.X_OK) else None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: object, **environ: object) -> subprocess.CompletedProcess[str]:
    """Run a program that can import fp4tune with this interpreter."""
    paths = os.pathsep.join(p for p in sys.path if p)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FP4TUNE_", "SLURM"))}
    env = {**kept, "PYTHONPATH": paths, "FP4TUNE_PYTHON": sys.executable}
    return subprocess.run(
        [str(word) for word in command],
        env={**env, "FP4TUNE_DEFAULTS": "/nonexistent", **{k: str(v) for k, v in environ.items()}},
        capture_output=True,
        text=True,
        timeout=120,
    )


def yaml_of(path: Path) -> list[dict]:
    yaml = pytest.importorskip("yaml")
    return [doc for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")) if doc]


def none_safe(place: Path) -> None:
    """A publication with a bucket for which nothing was safe, not even the floor."""
    choices, candidates = rows_for("a")
    bad = choices[0].__class__(
        **{
            **{name: getattr(choices[0], name) for name in choices[0].__slots__},
            "status": "none",
        }
    )
    publish.publish(place, [bad, *choices[1:]], candidates, [ENVIRONMENT], {"run": "a"})


# -- facts


def test_facts_of_what_is_published(tmp_path):
    put(tmp_path, layers=3)
    found = facts.gather(tmp_path)
    (scope,) = found["scopes"]
    assert (found["status"], found["generation"], found["state"]) == ("safe", 1, str(tmp_path))
    assert (scope["arch"], scope["gpu"], scope["profile"], scope["layers"]) == (
        "sm90", "H200", "strict", 3,
    )  # fmt: skip
    assert scope["answers"] == {"safe": 9, "stale": 0, "unproven": 0, "quarantined": 0}
    assert scope["backends"] == {"marlin": 9}


def test_facts_count_what_a_reader_answers(tmp_path):
    put(tmp_path)
    entry = quarantine.make(
        "marlin", quarantine.Reach(8, BUCKET.n, BUCKET.k, "bucket"), reason="NaN"
    )
    quarantine_store.write(entry, str(tmp_path / quarantine_store.FOLDER))
    found = facts.gather(tmp_path)
    view = reader.open(tmp_path)
    statuses = [view.choose(m, BUCKET.n, BUCKET.k).status for m in (0, 16, 64)]
    assert {s: n for s, n in found["scopes"][0]["answers"].items() if n} == {
        s: statuses.count(s) for s in statuses
    }
    assert found["status"] == "quarantined" and found["quarantines"] == 1


def test_a_bucket_with_nothing_safe_is_unproven(tmp_path):
    none_safe(tmp_path)
    found = facts.gather(tmp_path)
    assert found["status"] == "unproven"
    assert found["scopes"][0]["answers"] == {
        "safe": 2, "stale": 0, "unproven": 1, "quarantined": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "loaded, status", [("580.1\n", "safe"), ("590.2\n", "stale"), ("", "safe")]
)
def test_another_driver_makes_gpu_evidence_stale(tmp_path, loaded, status):
    device = {"kind": "cuda", "driver": "580.1"}
    environment = Environment("f" * 64, "marlin", "sm90", {"device": device})
    publish.publish(tmp_path, *rows_for("a"), [environment], {"run": "a"})
    driver = tmp_path / "version"
    driver.write_text(loaded)
    found = facts.gather(tmp_path, driver=str(driver))
    assert (found["status"], found["driver"]) == (status, loaded.strip() or None)


def test_facts_never_raise_for_what_the_state_is_like(tmp_path):
    assert facts.gather(tmp_path)["status"] == "missing"
    (tmp_path / state.CHOICES).write_bytes(b"not a database" * 999)
    assert facts.gather(tmp_path)["status"] == "unreadable"
    put(tmp_path / "good")
    other = facts.gather(tmp_path / "good", gpu="B200")
    assert other["status"] == "missing" and "gpu B200" in other["reason"]


def test_several_profiles_and_models_are_told_apart(tmp_path):
    first, second = rows_for("a", gpu="H200"), rows_for("a", gpu="H100")
    publish.publish(
        tmp_path, first[0] + second[0], first[1] + second[1], [ENVIRONMENT], {"run": "a"}
    )
    assert [s["gpu"] for s in facts.gather(tmp_path)["scopes"]] == ["H100", "H200"]
    assert [s["gpu"] for s in facts.gather(tmp_path, gpu="H100")["scopes"]] == ["H100"]


@pytest.mark.parametrize(
    "make, code",
    [(put, 0), (none_safe, 1), (lambda place: None, 2)],
    ids=["safe", "nothing safe", "nothing published"],
)
def test_check_ends_with_the_documented_exit_codes(tmp_path, make, code):
    make(tmp_path)
    lean = run(sys.executable, "-m", "fp4tune.cache.facts", "--check", "--state", tmp_path)
    full = CliRunner().invoke(cli.app, ["facts", "--check", "--state", str(tmp_path)])
    assert lean.returncode == full.exit_code == code
    assert lean.stdout == full.stdout and len(lean.stdout.splitlines()) == 1


def test_bad_input_ends_in_one_sentence(tmp_path):
    put(tmp_path)
    for words in (["--format", "xml"], ["--expires", "-1"], ["--out", "/nonexistent/x"]):
        done = CliRunner().invoke(cli.app, ["facts", "--state", str(tmp_path), *words])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output


def test_facts_import_the_standard_library_only(tmp_path):
    code = (
        "import sys; before = set(sys.modules); from fp4tune.cache import facts, facts_text;"
        f"facts.main(['--state', {str(tmp_path)!r}]);"
        "print({m.split('.')[0] for m in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names) - {'fp4tune'})"
    )
    assert run(sys.executable, "-c", code).stdout.splitlines()[-1] == "set()"


# -- the forms


@given(st.text())
def test_labels_are_ones_that_kubernetes_takes(text):
    made = facts_text.label(text)
    assert made == "" or re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", made)


def test_the_features_file(tmp_path):
    put(tmp_path)
    first, *rest = facts_text.render(facts.gather(tmp_path), "nfd", expires=600).splitlines()
    stamp = re.fullmatch(r"# \+expiry-time=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)", first)
    assert stamp
    until = time.mktime(time.strptime(stamp[1], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert 500 < until - time.time() < 700
    values = dict(line.split("=") for line in rest)
    prefix = "feature.node.kubernetes.io/fp4tune."
    assert all(name.startswith(prefix) for name in values)
    assert values[f"{prefix}status"] == values[f"{prefix}profile-strict"] == "safe"
    assert values[f"{prefix}ready"] == "true"
    (tmp_path / state.CHOICES).unlink()
    gone = facts_text.render(facts.gather(tmp_path), "nfd")
    assert f"{prefix}ready=false" in gone


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 10**6))
def test_the_textfile_says_what_the_facts_say(gpu, count):
    parser = pytest.importorskip("prometheus_client.parser")
    scope = {
        "arch": "sm90", "gpu": gpu, "profile": "strict", "status": "safe", "layers": 1,
        "answers": dict.fromkeys(facts.ANSWERS, count), "backends": {},
    }  # fmt: skip
    whole = {
        "status": "safe", "reason": "", "fp4tune": "1", "state": "/x", "generation": 3,
        "published": 1.5, "driver": None, "quarantines": 0, "scopes": [scope],
    }  # fmt: skip
    text = facts_text.render(whole, "textfile")
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    assert list(families) == [name for name, _, _ in facts_text.METRICS]
    samples = families["fp4tune_reader_answers"].samples
    assert {s.labels["gpu"] for s in samples} == {printable(gpu, facts_text._LABEL)}
    assert {s.value for s in samples} == {count}


def test_the_textfile_passes_promtool(tmp_path):
    put(tmp_path)
    text = facts_text.render(facts.gather(tmp_path), "textfile")
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=text, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_node_exporter_takes_the_textfile(tmp_path):
    exporter = tool("prometheus-node-exporter")
    put(tmp_path / "state")
    folder = tmp_path / "textfile"
    folder.mkdir()
    facts.main(
        ["--state", str(tmp_path / "state"), "--format", "textfile",
         "--out", str(folder / "fp4tune.prom")]
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--collector.disable-defaults", "--collector.textfile"]
    options += [f"--collector.textfile.directory={folder}", f"--web.listen-address={where}"]
    server = subprocess.Popen([exporter, *options], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://{where}/metrics", timeout=5) as answer:
                    said = answer.read().decode()
                break
            except OSError:
                time.sleep(0.1)
    finally:
        server.kill()
        server.wait()
    assert 'fp4tune_reader_answers{arch="sm90",gpu="H200",profile="strict",status="safe"} 3' in said
    assert "node_textfile_scrape_error 0" in said
    assert re.search(r'node_textfile_mtime_seconds{file=".*fp4tune\.prom"}', said)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    place = tmp_path / "fp4tune.prom"
    texts = [letter * 200_000 + "\n" for letter in "ab"]
    facts_text.put(texts[0], place)
    ended = threading.Event()

    def write() -> None:
        for turn in range(200):
            facts_text.put(texts[turn % 2], place)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert place.read_text() in texts
        assert [f for f in os.listdir(tmp_path) if not f.startswith(".")] == [place.name]
    writer.join()
    assert os.listdir(tmp_path) == [place.name]
    assert place.stat().st_mode & 0o777 == 0o644


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StateError):
        facts_text.put("x\n", tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]


# -- systemd


def units_in(folder: Path, change: tuple[str, str] = ("", "")) -> list[str]:
    """The units, with the programs of this machine, since systemd asks whether they exist."""
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8").replace(*change) if change[0] else unit.read_text()
        text = re.sub(r"/opt/fp4tune/bin/\w+", sys.executable, text)
        (folder / unit.name).write_text(text, encoding="utf-8")
    return [str(folder / unit.name) for unit in UNITS]


def test_systemd_accepts_the_units(tmp_path):
    verify = (tool("systemd-analyze"), "verify", "--recursive-errors=yes", "--man=no")
    done = run(*verify, *units_in(tmp_path))
    assert done.returncode == 0 and not done.stderr, done.stderr
    misspelt = run(*verify, *units_in(tmp_path, ("WatchdogSec=", "WatchDogSec=")))
    assert misspelt.returncode != 0 and "WatchDogSec" in misspelt.stderr


def test_units_come_before_the_nodes_agent_and_hold_nothing_up():
    daemon, probe = (
        (DEPLOY / "systemd" / f"fp4tune-{name}.service").read_text() for name in ("daemon", "probe")
    )
    for text in (daemon, probe):
        before = re.search(r"^Before=(.+)$", text, re.M)
        assert before and {"kubelet.service", "slurmd.service"} <= set(before[1].split())
        assert not re.search(r"^(RequiredBy|UpheldBy)=", text, re.M)
    assert "Type=notify" in daemon and "WatchdogSec=" in daemon
    assert "Type=oneshot" in probe and "TimeoutStartSec=" in probe


@pytest.mark.parametrize("make, probes", [(put, False), (none_safe, True), (os.listdir, True)])
def test_the_one_shot_probes_where_it_has_to(tmp_path, make, probes):
    make(tmp_path)
    text = (DEPLOY / "systemd" / "fp4tune-probe.service").read_text()
    found = re.search(r"^ExecCondition=/bin/sh -c '(.+)'$", text, re.M)
    assert found
    condition = found[1].replace("/opt/fp4tune/bin/python", sys.executable)
    # systemd goes on where the condition ends with 0, and skips the unit for 1 to 254.
    done = run("/bin/sh", "-c", condition, FP4TUNE_STATE=tmp_path)
    assert done.returncode == (0 if probes else 1)


def test_what_units_and_scripts_call_exists():
    """Every call in deploy/ parses, and no unit names a unit of ours that is not there."""
    names = {unit.name for unit in UNITS}
    for file in DEPLOY.rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            text = file.read_text(encoding="utf-8")
            assert set(re.findall(r"\bfp4tune-[\w-]+\.(?:service|timer)", text)) <= names, file
            for call in re.findall(r"fp4tune\.cache\.facts ((?:--[\w-]+(?: [\w/.]+)?\s?)+)", text):
                options = re.findall(r"--[\w-]+", call)
                parameters = CliRunner().invoke(cli.app, ["facts", "--help"]).stdout
                assert all(option in parameters for option in options), call


# -- Kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_accepts_the_manifests(name, tmp_path):
    validate = (tool("kubernetes-validate"), "--strict")
    done = run(*validate, DEPLOY / "kubernetes" / name)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARN" not in said and "passed" in said, said
    wrong = tmp_path / name
    wrong.write_text((DEPLOY / "kubernetes" / name).read_text().replace("mountPath", "mountpath"))
    wrong.write_text(wrong.read_text().replace("hostNetwork", "hostnetwork"))
    assert run(*validate, wrong).returncode != 0


def pods(name: str) -> list[dict]:
    documents = yaml_of(DEPLOY / "kubernetes" / name)
    return [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "DaemonSet"] + [
        d["spec"] for d in documents if d["kind"] == "Pod"
    ]


def test_engines_mount_the_directory_read_only():
    (pod,) = pods("engine-pod.yaml")
    paths = {v["name"]: v["hostPath"] for v in pod["volumes"]}
    assert paths["fp4tune"] == {"path": "/var/lib/fp4tune", "type": "Directory"}
    for container in (*pod["containers"], *pod["initContainers"]):
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "fp4tune"]
        assert mount["readOnly"] is True and "subPath" not in mount
        variables = {e["name"]: e["value"] for e in container["env"]}
        assert variables[state.VARIABLE] == mount["mountPath"]


def test_the_engines_gate_opens_when_choices_are_proven(tmp_path):
    """The init container's script, really run beside a state that becomes ready."""
    (pod,) = pods("engine-pod.yaml")
    (shell, option, script) = pod["initContainers"][0]["command"]
    script = script.replace("python3", sys.executable).replace("sleep 10", "sleep 0.1")
    publisher = threading.Timer(0.7, put, [tmp_path])
    publisher.start()
    done = run(shell, option, script, FP4TUNE_STATE=tmp_path)
    publisher.join()
    *waited, last = done.stdout.splitlines()
    assert done.returncode == 0 and last.startswith("safe: generation 1")
    assert waited and all(line.startswith("missing: ") for line in waited)


def test_rights_are_given_only_where_needed():
    """The daemon asks the API server for nothing; the reporter may set conditions of nodes."""
    for name in MANIFESTS:
        for pod in pods(name):
            readiness = pod.get("serviceAccountName") == "fp4tune-readiness"
            assert pod["automountServiceAccountToken"] is readiness
            for container in pod["containers"]:
                assert not container.get("securityContext", {}).get("privileged")
    documents = [d for name in MANIFESTS for d in yaml_of(DEPLOY / "kubernetes" / name)]
    roles = [d for d in documents if d["kind"] in ("Role", "ClusterRole")]
    assert [rule for role in roles for rule in role["rules"]] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["update"]},
    ]


def test_the_daemons_pod_fits_the_daemon(tmp_path):
    documents = yaml_of(DEPLOY / "kubernetes" / "fp4tune.yaml")
    (text,) = [d["data"]["daemon.toml"] for d in documents if d["kind"] == "ConfigMap"]
    path = tmp_path / "daemon.toml"
    path.write_text(text)
    config = configuring.load(path)
    (pod,) = pods("fp4tune.yaml")
    container = pod["containers"][0]
    asked = [container[f"{kind}Probe"]["exec"] for kind in ("startup", "liveness", "readiness")]
    assert [a["command"][-1] for a in asked] == ["/healthz", "/healthz", "/readyz"]
    for *command, socket_, _ in (a["command"] for a in asked):
        assert command == ["python3", "-m", ask.__name__]
        assert f"unix:{socket_}" == config.http.health, "a flood of the port restarts nobody"
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert str(Path(config.http.health.removeprefix("unix:")).parent) in mounted
    # Root without it sees neither who holds a lock, nor whether that one computes.
    assert container["securityContext"]["capabilities"]["add"] == ["SYS_PTRACE"]
    assert pod["hostNetwork"] and pod["hostPID"]
    assert "nvidia.com/gpu" not in json.dumps(container["resources"])
    memory = container["resources"]["limits"]["memory"]
    assert config.limits.host_gib is not None and config.limits.host_gib < int(memory[:-2])


def test_the_readiness_gate_is_one_thing_in_all_its_files():
    (rule,) = yaml_of(DEPLOY / "kubernetes" / "readiness-rule.yaml")
    (pod,) = pods("readiness.yaml")
    variables = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    (condition,) = rule["spec"]["conditions"]
    assert condition == {"type": variables["CONDITION_TYPE"], "requiredStatus": "True"}
    host, port = configuring.address(configuring.HttpOptions().listen)
    assert variables["CHECK_ENDPOINT"] == f"http://{host}:{port}/readyz"
    assert rule["spec"]["taint"]["key"].startswith("readiness.k8s.io/")
    assert pod["hostNetwork"]


# -- Slurm and Ansible


@pytest.mark.parametrize(
    "script",
    [*sorted((DEPLOY / "slurm").glob("*.sh")), DEPLOY / "ansible" / "fp4tune.fact"],
    ids=lambda p: p.name,
)
def test_scripts_are_plain_shell(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["/bin/sh", "-n", str(script)]).returncode == 0
    done = run(tool("shellcheck"), script)
    assert done.returncode == 0, done.stdout


def slurm(name: str, place: Path, **environ: object) -> subprocess.CompletedProcess[str]:
    variables = {"FP4TUNE_STATE": place, "FP4TUNE_RUN": place / "run", "SLURM_JOB_ID": 7}
    return run(DEPLOY / "slurm" / f"fp4tune-{name}.sh", **{**variables, **environ})


def test_all_tasks_of_a_job_pin_what_its_prolog_saw(tmp_path):
    put(tmp_path)
    done = slurm("prolog", tmp_path, SLURM_JOB_GPUS="0,1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    put(tmp_path, "b")  # published between two tasks of one job
    said = slurm("task-prolog", tmp_path, FP4TUNE_STATE="").stdout.splitlines()
    assert said == ["export FP4TUNE_GENERATION=1", f"export FP4TUNE_STATE={tmp_path}"]
    pinned = reader.open(tmp_path, generation=1)
    assert pinned.choose(8, BUCKET.n, BUCKET.k).tactic == "a"
    assert slurm("task-prolog", tmp_path).stdout.splitlines() == said
    assert "GENERATION" not in slurm("task-prolog", tmp_path, FP4TUNE_GENERATION=2).stdout
    assert slurm("task-prolog", tmp_path, FP4TUNE_STATE="/another").stdout == ""
    slurm("epilog", tmp_path)
    assert slurm("task-prolog", tmp_path).stdout == ""
    assert os.listdir(tmp_path / "run") == []


def test_the_prolog_stops_a_job_only_where_it_is_told_to(tmp_path):
    none_safe(tmp_path)
    gpus = {"SLURM_JOB_GPUS": "0"}
    warned = slurm("prolog", tmp_path, **gpus)
    assert warned.returncode == 0 and warned.stderr.startswith("fp4tune: unproven: generation 1")
    defaults = tmp_path / "defaults"
    defaults.write_text('FP4TUNE_STRICT="1"\n')
    assert slurm("prolog", tmp_path, **gpus, FP4TUNE_DEFAULTS=defaults).returncode == 1
    assert slurm("prolog", tmp_path, FP4TUNE_DEFAULTS=defaults).returncode == 0  # no GPU asked for
    empty = tmp_path / "empty"
    empty.mkdir()
    unknown = slurm("prolog", empty, **gpus, FP4TUNE_DEFAULTS=defaults)
    assert unknown.returncode == 0 and "missing" in unknown.stderr


@pytest.fixture
def cluster(tmp_path):
    """`sinfo` and `scontrol` over a folder with one file per node, which holds its reason."""
    programs, nodes = tmp_path / "bin", tmp_path / "nodes"
    programs.mkdir()
    nodes.mkdir()
    (programs / "sinfo").write_text(
        "#!/bin/sh\n"
        'for a; do case $a in --nodes=*) exec cat "$NODES/${a#--nodes=}" ;; esac; done\n'
        'cd "$NODES" && for n in *; do echo "$n|$(cat "$n")"; done\n'
    )
    (programs / "scontrol").write_text(
        "#!/bin/sh\n"
        "node=${2#NodeName=} reason=none\n"
        '[ "$3" = State=RESUME ] || reason=${4#Reason=}\n'
        'echo "$reason" > "$NODES/$node"\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    for name in "abc":
        (nodes / name).write_text("none\n")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return nodes, {"PATH": path, "NODES": nodes, "SLURMD_NODENAME": "a"}


def test_the_health_check_drains_and_undoes_only_its_own(tmp_path, cluster):
    nodes, environ = cluster
    good, bad, empty = (tmp_path / name for name in ("good", "bad", "empty"))
    put(good)
    none_safe(bad)
    empty.mkdir()

    def reason(place: Path) -> str:
        done = slurm("health", place, **environ)
        assert done.returncode == 0
        return (nodes / "a").read_text().strip()

    assert reason(good) == reason(empty) == "none"
    assert reason(bad).startswith("fp4tune: unproven: generation 1")
    assert reason(empty).startswith("fp4tune: ")  # what is not known now does not bring it back
    assert reason(good) == "none"
    (nodes / "a").write_text("bad fan\n")
    assert reason(bad) == reason(good) == "bad fan"


def test_the_health_check_does_not_drain_the_whole_cluster(tmp_path, cluster):
    nodes, environ = cluster
    none_safe(tmp_path / "state")
    (nodes / "b").write_text("fp4tune: unproven\n")
    (nodes / "c").write_text("fp4tune: unproven\n")
    done = slurm("health", tmp_path / "state", **environ, FP4TUNE_MOST_DRAINED=2)
    assert (nodes / "a").read_text() == "none\n" and "not drained" in done.stderr
    slurm("health", tmp_path / "state", **environ, FP4TUNE_MOST_DRAINED=3)
    assert (nodes / "a").read_text().startswith("fp4tune: ")


def test_the_ansible_fact_is_json(tmp_path):
    put(tmp_path)
    done = run(DEPLOY / "ansible" / "fp4tune.fact", FP4TUNE_STATE=tmp_path)
    assert json.loads(done.stdout) == facts.gather(tmp_path)
    missing = run(DEPLOY / "ansible" / "fp4tune.fact", FP4TUNE_STATE=tmp_path / "none")
    assert missing.returncode == 0 and json.loads(missing.stdout)["status"] == "missing"


def test_ansible_reads_the_fact(tmp_path):
    ansible = tool("ansible")
    put(tmp_path / "state")
    (tmp_path / "facts.d").mkdir()
    shutil.copy(DEPLOY / "ansible" / "fp4tune.fact", tmp_path / "facts.d")
    asked = f"gather_subset=!all,!min,local filter=ansible_local fact_path={tmp_path / 'facts.d'}"
    done = run(
        ansible, "localhost", "-c", "local", "-m", "setup", "-a", asked,
        FP4TUNE_STATE=tmp_path / "state", HOME=tmp_path, ANSIBLE_PYTHON_INTERPRETER=sys.executable,
        ANSIBLE_NOCOLOR=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout[done.stdout.index("{") :])
    assert document["ansible_facts"]["ansible_local"]["fp4tune"]["status"] == "safe"


# -- Prometheus and Grafana


def metrics() -> dict[str, set[str]]:
    """Every metric there is, with its labels: the daemon's, the textfile's."""
    pytest.importorskip("prometheus_client")
    from fp4tune.daemon.board import Board
    from fp4tune.daemon.metrics import Metrics

    found = {name: set(labels) for name, _, labels in facts_text.METRICS}
    for family in Metrics(Board()).collect():
        suffix = "_total" if family.type == "counter" else ""
        found[family.name + suffix] = set(family._labelnames)
    # These come from Prometheus and node_exporter themselves.
    return {**found, "up": {"job"}, "node_textfile_mtime_seconds": {"file"}, "ALERTS": set()}


def expressions() -> list[str]:
    rules = [r["expr"] for d in yaml_of(RULES) for g in d["groups"] for r in g["rules"]]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return rules + [t["expr"] for p in panels for t in p.get("targets", [])]


def test_alerts_and_panels_use_metrics_that_exist():
    from fp4tune.daemon.gpus import STATES
    from fp4tune.daemon.probes import OUTCOMES

    tree = ast.parse((ROOT / "machine" / "nvml.py").read_text())
    (events,) = [
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "EVENTS"
    ]  # fmt: skip
    known = metrics()
    values = {
        "fp4tune_gpu_state": {"state": set(STATES)},
        "fp4tune_probes_total": {"outcome": set(OUTCOMES)},
        "fp4tune_gpu_events_total": {"kind": set(ast.literal_eval(events))},
        "fp4tune_reader_answers": {"status": set(facts.ANSWERS)},
        "fp4tune_choices": {"status": {"safe", "floor", "none"}},
    }
    used = set()
    for expr in expressions():
        for name, selector in re.findall(r"\b((?:fp4tune|node)_\w+|up)\b(?:{([^}]*)})?", expr):
            used.add(name)
            assert name in known, expr
            for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', selector):
                assert label in known[name] | {"instance"}, expr
                allowed = values.get(name, {}).get(label)
                assert allowed is None or set(value.split("|")) <= allowed, (expr, operator)
        by = re.findall(r"by \(([^)]*)\)", expr)
        names = re.findall(r"\bfp4tune_\w+", expr)
        for labels in by:
            for label in labels.split(", "):
                assert all(label in known[n] | {"instance"} for n in names), (label, expr)
    unused = {n for n in known if n.startswith("fp4tune_")} - used
    assert unused <= {
        "fp4tune_reader_info",
        "fp4tune_reader_generation",
        "fp4tune_reader_published_timestamp_seconds",
        "fp4tune_reader_quarantines",
        # The same in a word, for people; alerts are on the numbers.
        "fp4tune_status",
        "fp4tune_reader_status",
    }


def test_promtool_accepts_the_alerts():
    promtool = tool("promtool")
    done = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(promtool, "test", "rules", RULES.with_name("fp4tune.rules.test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire():
    alerts = {r["alert"] for d in yaml_of(RULES) for g in d["groups"] for r in g["rules"]}
    (tested,) = yaml_of(RULES.with_name("fp4tune.rules.test.yml"))
    fired = {
        re.sub(r'.*"(\w+)".*', r"\1", sample["labels"])
        for test in tested["tests"]
        for expr in test.get("promql_expr_test", [])
        for sample in expr["exp_samples"]
    }
    assert fired == alerts


def test_promtool_parses_every_panel(tmp_path):
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rules = [
        {"record": f"panel:{p['id']}", "expr": t["expr"].replace("$instance", ".*")}
        for p in panels
        for t in p.get("targets", [])
    ]
    path = tmp_path / "panels.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = run(tool("promtool"), "check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_holds_together():
    board = json.loads(DASHBOARD.read_text())
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    assert len({p["title"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "instance"}


def test_the_dashboard_is_what_its_script_makes():
    pytest.importorskip("grafana_foundation_sdk")
    done = run(sys.executable, DEPLOY / "grafana" / "dashboard.py")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(DASHBOARD.read_text())


def test_the_pages_name_what_there_is(tmp_path):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| .* \| \d \|$", page, re.M)) == set(facts.EXIT)
    commands = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    section = commands.split("## fp4tune facts\n")[1].split("\n## ")[0]
    keys = section.split("| JSON key |")[1]
    named = {
        n for row in re.findall(r"^\| (`.+?`) \|", keys, re.M) for n in re.findall(r"`(\w+)`", row)
    }
    assert named == set(facts.gather(tmp_path))
    for name, _, labels in facts_text.METRICS:
        assert all(f"`{word}`" in page for word in (name, *labels))


def test_the_page_names_every_file():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for file in DEPLOY.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.name in page, file.name
