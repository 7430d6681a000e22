// The page's behaviour: takes a picture, asks /v1/predict, shows the answer, sends feedback. No dependency.
"use strict";

const at = (id) => document.getElementById(id);
const { types, maxPixels, maxBytes, asksForKey } = document.body.dataset;
const accepted = types.split(",");
let last = null; // what the feedback is about: {requestId}
let turn = 0; // counts pictures, so that a slow answer to an earlier one is not shown

const percent = (p) => `${(100 * p).toFixed(1)} %`;

function headers(more) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : { ...more };
}

async function ask(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch {
    throw new Error("The server does not answer. See that it runs, then try again.");
  }
  const body = await reply.json().catch(() => ({}));
  if (reply.status === 401) showKeyForm();
  if (!reply.ok) throw new Error(body.detail ?? `The server answered ${reply.status}.`);
  return body;
}

function showError(error) {
  at("error").textContent = error.message;
  at("error").hidden = false;
  say("");
}

function say(text, { spokenOnly = false } = {}) {
  at("status").classList.toggle("spoken", spokenOnly);
  at("status").textContent = text;
}

function showKeyForm() {
  sessionStorage.removeItem("key");
  at("key-form").hidden = false;
  at("key").focus();
}

// The server refuses enormous pictures; the model sees 32x32 anyway, so make them smaller here.
async function within(file) {
  const picture = await createImageBitmap(file).catch(() => null);
  if (!picture) return file; // let the server say what is wrong with it
  const pixels = picture.width * picture.height;
  if (pixels <= Number(maxPixels) && file.size <= Number(maxBytes)) return file;
  const scale = Math.min(1, 1024 / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

async function classify(file) {
  const mine = ++turn;
  at("error").hidden = true;
  at("thanks").textContent = "";
  if (!accepted.includes(file.type)) {
    refuse(new Error(`This is ${file.type || "a file of unknown type"}. Give it a PNG, JPEG or WebP picture.`));
    return;
  }
  say("Looking…");
  try {
    const body = await within(file);
    const reply = await ask("/v1/predict?include=image", {
      method: "POST",
      headers: { "Content-Type": body.type },
      body,
    });
    if (mine === turn) show(reply);
  } catch (error) {
    if (mine === turn) refuse(error);
  }
}

// What stands there is of the picture before: feedback on it would be taken for feedback on this one.
function refuse(error) {
  at("result").hidden = true;
  showError(error);
}

function show(reply) {
  const [prediction] = reply.predictions;
  last = { requestId: reply.request_id };
  at("seen").src = `data:image/png;base64,${prediction.image}`;
  at("answer").textContent = prediction.label;
  at("confidence").textContent = percent(prediction.probability);
  for (const row of at("bars").children) {
    const p = prediction.probabilities[row.dataset.label];
    row.classList.toggle("best", row.dataset.label === prediction.label);
    row.querySelector(".bar").style.width = `${100 * p}%`;
    row.querySelector(".value").textContent = percent(p);
  }
  at("label").value = prediction.label;
  at("feedback").querySelector("button").disabled = false;
  at("result").hidden = false;
  say(`It says: ${prediction.label}, ${percent(prediction.probability)}.`, { spokenOnly: true });
  showModel(reply.model);
}

function showModel(model) {
  const line = at("model");
  const learnt = model.data === "SYNTHETIC" ? "" : `, learnt from ${model.data}`;
  line.textContent = `${model.name}, version ${model.version} (${model.alias})${learnt}`;
  const warnings = [];
  if (model.data === "SYNTHETIC") warnings.push("SYNTHETIC data");
  if (model.weights === "RANDOM WEIGHTS") warnings.push("RANDOM WEIGHTS");
  for (const text of warnings) {
    const mark = document.createElement("span");
    mark.className = "warn";
    mark.textContent = text;
    line.append(" ", mark);
  }
}

async function lookForModel() {
  if (asksForKey === "yes" && !sessionStorage.getItem("key")) {
    at("model").textContent = "";
    showKeyForm();
    return;
  }
  try {
    showModel(await ask("/v1/model"));
  } catch (error) {
    at("model").textContent = error.message;
  }
}

at("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) classify(file);
  event.target.value = ""; // so that the same file can be chosen again
});

// The whole page takes drops: missing the box must not make the browser leave for the picture.
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind !== "drop") return;
    const [file] = event.dataTransfer.files;
    if (file) classify(file);
    else showError(new Error("That was not a file. Save the picture first, then drop the file."));
  });
}

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) classify(file);
});

at("feedback").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  at("thanks").textContent = "";
  try {
    const { label } = await ask("/v1/feedback", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ request_id: last.requestId, index: 0, label: at("label").value }),
    });
    at("error").hidden = true;
    at("thanks").textContent = `Noted: ${label}. Thank you.`;
  } catch (error) {
    showError(error);
  } finally {
    button.disabled = false;
  }
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  at("error").hidden = true;
  lookForModel();
});

lookForModel();
