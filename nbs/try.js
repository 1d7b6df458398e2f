// The puzzle, the verifier and the detectors in a page: Python runs here, from files of this site alone.

const demo = document.getElementById("demo");
const folder = new URL(demo.dataset.pyodide, location.href).href;

const PYTHON = String.raw`
import json, random, re
from stars.habits.behaviors import COLORS, HABIT_NAMES, find_behaviors, meaning_of
from stars.task.countdown import explain, solvable, solve

def ints(text):
    found = re.findall(r"\d+", text)
    if not found or not re.fullmatch(r"[\d\s,]+", text):
        raise ValueError("numbers and target must be whole numbers, for example 3 4 10 and 34")
    return [int(x) for x in found]

def one(text):
    found = ints(text)
    if len(found) > 1:
        raise ValueError("the target must be one number, for example 34")
    return found[0]

def verdict(numbers, target, answer):
    v = explain(answer if "<answer>" in answer else f"<answer>{answer}</answer>", ints(numbers), one(target))
    return json.dumps(dict(score=v.score, text=str(v)))

def solution(numbers, target):
    if len(ints(numbers)) > 6:
        raise ValueError("a search over more than 6 numbers takes too long here")
    return json.dumps(solve(ints(numbers), one(target)))

def puzzle():
    while True:
        numbers, target = [random.randint(1, 20) for _ in range(random.choice((3, 4)))], random.randint(10, 60)
        if target not in numbers and solvable(numbers, target):
            return json.dumps(dict(numbers=" ".join(map(str, numbers)), target=target))

def habits(trace, numbers, target):
    spans = find_behaviors(trace, ints(numbers), one(target))
    about = {h: dict(color=COLORS[h], meaning=meaning_of(h), n=sum(s.habit == h for s in spans)) for h in HABIT_NAMES}
    # positions in UTF-16, as the page counts
    at = lambda i: len(trace[:i].encode("utf-16-le", "surrogatepass")) // 2
    return json.dumps(dict(about=about, spans=[(at(s.start), at(s.end), s.habit) for s in spans]))
`;

const find = name => demo.querySelector(`[name=${name}]`);
const say = text => { demo.querySelector(".status").textContent = text; };

let loading = null;
const python = () => (loading ??= load());

async function load() {
  say("Python is coming, some 20 MB the first time …");
  try {
    const { loadPyodide } = await import(`${folder}pyodide.mjs`);
    const py = await loadPyodide({ indexURL: folder });
    await py.loadPackage("stars-habits", { messageCallback: () => {} });
    py.runPython(PYTHON);
    say("Python runs in this page.");
    return py;
  } catch (e) {
    loading = null; // so that the next click tries again
    say(`Python did not start: ${e.message.split("\n")[0]}`);
    throw e;
  }
}

// Call a function of the program above with texts; what it raises is told where its result would stand
async function ask(output, name, ...texts) {
  const py = await python();
  const f = py.globals.get(name);
  try {
    return JSON.parse(f(...texts));
  } catch (e) {
    const lines = e.message.trim().split("\n");
    output.dataset.is = "wrong";
    output.textContent = lines[lines.length - 1].replace(/^\w+: /, "");
    return undefined;
  } finally {
    f.destroy();
  }
}

function show(output, text, right) {
  output.dataset.is = right ? "right" : "wrong";
  output.textContent = text;
}

const puzzle = () => [find("numbers").value, find("target").value];
const result = demo.querySelector(".verdict"), marked = demo.querySelector(".marked");

async function check() {
  const v = await ask(result, "verdict", ...puzzle(), find("answer").value);
  if (v) show(result, v.text, v.score === 1);
}

async function solve() {
  const s = await ask(result, "solution", ...puzzle());
  if (s !== undefined) show(result, s === null ? "There is no answer." : `${s} = ${find("target").value}`, s !== null);
}

async function another() {
  const p = await ask(result, "puzzle");
  if (!p) return;
  find("numbers").value = p.numbers;
  find("target").value = p.target;
  find("answer").value = result.textContent = "";
}

// A piece of the trace in the colours of its habits: the first as its ground, every further one as a line below
function piece(text, here, about) {
  if (!here.length) return document.createTextNode(text);
  const mark = document.createElement("mark");
  const lines = here.map((h, i) => `0 ${2 * (i + 1)}px ${about[h].color}`);
  mark.style.cssText = `background:${about[here[0]].color}40;box-shadow:${lines.join(",")}`;
  mark.title = here.map(h => `${h}: the writer ${about[h].meaning}`).join("\n");
  mark.textContent = text;
  return mark;
}

async function habits() {
  const text = find("trace").value;
  const found = await ask(marked, "habits", text, ...puzzle());
  if (!found) return;
  const { about, spans } = found;
  const counts = document.createElement("p");
  for (const [h, { color, meaning, n }] of Object.entries(about)) {
    const chip = piece(`${h} ${n}`, [h], about);
    chip.title = `the writer ${meaning}`;
    counts.append(chip, " ");
  }
  const cuts = [...new Set([0, text.length, ...spans.flatMap(([a, b]) => [a, b])])].sort((a, b) => a - b);
  const body = document.createElement("p");
  for (let i = 0; i + 1 < cuts.length; i++) {
    const here = new Set(spans.filter(([a, b]) => a <= cuts[i] && cuts[i + 1] <= b).map(s => s[2]));
    body.append(piece(text.slice(cuts[i], cuts[i + 1]), [...here], about));
  }
  delete marked.dataset.is;
  marked.replaceChildren(counts, body);
}

const guarded = f => event => { event.preventDefault(); f().catch(console.error); };
demo.querySelector(".puzzle").addEventListener("submit", guarded(check));
demo.querySelector(".trace").addEventListener("submit", guarded(habits));
find("solve").addEventListener("click", guarded(solve));
find("another").addEventListener("click", guarded(another));
demo.addEventListener("focusin", () => python().catch(() => {}), { once: true });
