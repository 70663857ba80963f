"use strict";

const AT_ONCE = 4;      // requests in flight
const ATTEMPTS = 20;    // while the service is busy
const THUMBNAILS = 200; // so that a large folder does not fill the memory
const byId = (id) => document.getElementById(id);
const waiting = [];
let running = 0, done = 0, found = 0, thumbnails = 0;

const WORDS = {
  present: (answer) => answer.sentence[0].toUpperCase() + answer.sentence.slice(1),
  absent: (answer) => answer.sentence[0].toUpperCase() + answer.sentence.slice(1),
  inconclusive: () => "Inconclusive",
};
const LIMITS = {
  present: "It does not prove who made the picture, nor that it is unmodified.",
  absent: "It does not prove that no model made the picture: marks can be lost or removed.",
  inconclusive: "Nothing follows from it.",
};

function basis(answer) {
  const { model, keys_tested: keys, alpha, calibration } = answer.rests_on;
  const tested = keys === 1 ? "1 key" : `${keys} keys`;
  const checked = calibration ? "checked against unmarked pictures" : "not checked against unmarked pictures";
  return `Rests on the noise that model ${model} recovers, tested for ${tested} at level ${alpha}, ${checked}. ` +
    LIMITS[answer.verdict];
}

function show(item, answer, problem) {
  item.classList.add(problem ? "error" : answer.verdict);
  item.querySelector(".verdict").textContent = problem ? `Not tested: ${problem}` : WORDS[answer.verdict](answer);
  if (problem) return;
  item.querySelector(".basis").textContent = basis(answer);
  item.querySelector(".notes").textContent = answer.notes.length ? `Picture: ${answer.notes.join("; ")}.` : "";
  if (answer.evidence) showFigures(item.querySelector(".evidence"), answer.evidence);
}

function showFigures(details, evidence) {
  const figures = { "key that fits best": evidence.key, p: evidence.p_value.toPrecision(2), score: evidence.score.toPrecision(4) };
  for (const [stage, p] of Object.entries(evidence.stages)) figures[`p, ${stage}`] = p.toPrecision(2);
  if (evidence.notes.length) figures.notes = evidence.notes.join("; ");
  for (const [name, value] of Object.entries(figures)) {
    details.lastElementChild.append(element("dt", name), element("dd", value));
  }
  details.hidden = false;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

async function ask(file) {
  const body = new FormData();
  body.append("file", file, "picture"); // its name is nobody's business
  const token = byId("token").value.trim();
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const response = await fetch("v1/verify", { method: "POST", body, headers });
    if (response.status !== 429) return response;
    await new Promise((go) => setTimeout(go, 1000 * (Number(response.headers.get("Retry-After")) || 1)));
  }
  throw new Error("busy");
}

async function test(file, item) {
  try {
    const response = await ask(file);
    const answer = await response.json();
    if (response.ok) {
      found += answer.verdict === "present";
      show(item, answer);
    } else if (response.status === 401) {
      byId("access").open = true;
      show(item, null, "this needs an access token; give it above and choose the picture again");
    } else {
      show(item, null, answer.code.startsWith("image.") ? `the picture ${answer.message}` : answer.message);
    }
  } catch {
    show(item, null, "the service does not answer, or is busy");
  }
}

function report() {
  const all = done + running + waiting.length;
  const carrying = `${found} ${found === 1 ? "carries" : "carry"} a key`;
  byId("progress").textContent = done < all ? `Testing: ${done} of ${all} done, ${carrying}.`
    : `Done: ${all === 1 ? "1 picture" : `${all} pictures`}, ${carrying}.`;
}

function work() {
  while (waiting.length && running < AT_ONCE) {
    const [file, item] = waiting.shift();
    running++;
    test(file, item).finally(() => { running--; done++; report(); work(); });
  }
}

function nameOf(file) {
  return file.webkitRelativePath || file.droppedFrom || file.name;
}

function add(files) {
  files.sort((one, other) => nameOf(one).localeCompare(nameOf(other), undefined, { numeric: true }));
  for (const file of files) {
    const item = byId("result").content.cloneNode(true).firstElementChild;
    item.querySelector("h3").textContent = nameOf(file);
    item.querySelector(".verdict").textContent = "Waiting …";
    const image = item.querySelector("img");
    if (thumbnails++ < THUMBNAILS) {
      const url = URL.createObjectURL(file);
      image.onload = () => { image.hidden = false; URL.revokeObjectURL(url); };
      image.onerror = () => URL.revokeObjectURL(url);
      image.src = url;
    }
    byId("list").append(item);
    waiting.push([file, item]);
  }
  if (!files.length) {
    byId("progress").textContent = "There are no files in it.";
    return;
  }
  byId("results").hidden = false;
  report();
  work();
}

async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    file.droppedFrom = entry.fullPath.slice(1);
    return [file];
  }
  const reader = entry.createReader(), files = [];
  for (;;) { // a reader hands out entries in portions
    const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!entries.length) return files;
    for (const each of entries) files.push(...await filesOf(each));
  }
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const folder = entries.some((entry) => entry.isDirectory);
  const files = (await Promise.all(entries.map(filesOf))).flat();
  return folder ? files.filter((file) => file.type.startsWith("image/")) : files;
}

const drop = byId("drop");
for (const type of ["dragover", "dragenter"]) {
  document.addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(await dropped(event.dataTransfer));
});
drop.addEventListener("submit", (event) => event.preventDefault());
byId("files").addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
byId("folder").addEventListener("change", (event) => {
  add([...event.target.files].filter((file) => file.type.startsWith("image/")));
  event.target.value = "";
});
if (!("webkitdirectory" in byId("folder"))) byId("folder-button").hidden = true;
