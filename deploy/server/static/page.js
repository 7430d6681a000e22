// The page's behaviour: takes a picture, asks /v1/predict, shows the answer, sends feedback. No dependency.
import { ask, key, Refused } from "./server.js";

const at = (id) => document.getElementById(id);
const { types, maxPixels, maxBytes, asksForKey } = document.body.dataset;
const accepted = types.split(",");
const examples = [...document.querySelectorAll(".example")];
const still = matchMedia("(prefers-reduced-motion: reduce)");
let last = null; // what the feedback is about: a request id
let turn = 0; // counts pictures, so that a slow answer to an earlier one is not shown
let countdown = 0; // the timer until it is worth trying again

const inLines = (message) => message.replace(" Fix: ", "\nFix: ");
const percent = (p) => `${(100 * p).toFixed(1)} %`;

// The server refuses enormous pictures; the model sees 32x32 anyway, so make them smaller here.
async function within(file) {
  const picture = await createImageBitmap(file).catch(() => null);
  if (!picture) return file; // let the server say what is wrong with it
  const pixels = picture.width * picture.height;
  if (pixels <= Number(maxPixels) && file.size <= Number(maxBytes)) return file;
  const scale = Math.min(1, 1024 / Math.max(picture.width, picture.height));
  return png(picture, Math.max(1, Math.round(picture.width * scale)), Math.max(1, Math.round(picture.height * scale)));
}

function png(picture, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, 0, 0, width, height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

async function classify(file, example = null) {
  const mine = ++turn;
  hideError();
  at("thanks").textContent = "";
  at("feedback-error").hidden = true;
  for (const button of examples) button.setAttribute("aria-pressed", String(button === example));
  if (!accepted.includes(file.type)) {
    refuse(new Error(`This is ${file.type || "a file of unknown type"}. Give it a PNG, JPEG or WebP picture.`));
    return;
  }
  say("Looking…");
  try {
    const body = await within(file);
    const started = performance.now();
    const reply = await ask("/v1/predict?include=image", {
      method: "POST",
      headers: { "Content-Type": body.type },
      body,
    });
    if (mine === turn) show(reply, performance.now() - started);
  } catch (error) {
    if (mine === turn) refuse(error, () => classify(file, example));
  }
}

// What stands there is of the picture before: feedback on it would be taken for feedback on this one.
function refuse(error, again) {
  at("result").hidden = true;
  at("empty").hidden = false;
  showError(error, again);
}

function showError(error, again) {
  say("");
  at("error").textContent = inLines(error.message);
  at("trouble").hidden = false;
  at("again").hidden = !(again && error instanceof Refused && error.seconds !== null);
  at("again").onclick = again;
  if (error.status === 401) showKeyForm();
  else if (!at("again").hidden) waitFor(error.seconds);
}

function hideError() {
  clearInterval(countdown);
  at("error").textContent = "";
  at("trouble").hidden = true;
}

// The button counts down: the text beside it is read aloud when it changes, which this is not worth.
function waitFor(seconds) {
  const until = performance.now() + 1000 * seconds;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    at("again").disabled = left > 0;
    at("again").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
  };
  clearInterval(countdown);
  countdown = setInterval(tick, 200);
  tick();
}

function say(text, { spokenOnly = false } = {}) {
  at("status").classList.toggle("spoken", spokenOnly);
  at("status").textContent = text;
}

function showKeyForm() {
  key.forget();
  at("key-form").hidden = false;
  at("key").focus();
}

function show(reply, milliseconds) {
  const [prediction] = reply.predictions;
  last = reply.request_id;
  at("seen").src = `data:image/png;base64,${prediction.image}`;
  at("answer").textContent = prediction.label;
  at("confidence").textContent = percent(prediction.probability);
  for (const row of at("bars").children) {
    const p = prediction.probabilities[row.dataset.label];
    row.classList.toggle("best", row.dataset.label === prediction.label);
    row.querySelector(".bar").style.width = `${100 * p}%`;
    row.querySelector(".value").textContent = percent(p);
  }
  at("time").textContent = `${Math.max(1, Math.round(milliseconds))} ms`;
  at("request-id").textContent = reply.request_id;
  at("copy").textContent = "Copy";
  at("label").value = prediction.label;
  at("feedback").querySelector("button").disabled = false;
  at("empty").hidden = true;
  at("result").hidden = false;
  say(`It says: ${prediction.label}, ${percent(prediction.probability)}.`, { spokenOnly: true });
  showModel(reply.model);
  // On a phone the answer is below what was pressed.
  if (at("result").getBoundingClientRect().top > 0.7 * innerHeight) {
    at("result").scrollIntoView({ behavior: still.matches ? "auto" : "smooth", block: "start" });
  }
}

function showModel(model) {
  const isSynthetic = model.data === "SYNTHETIC";
  const isRandom = model.weights === "RANDOM WEIGHTS";
  const learnt = isSynthetic ? "" : `, learnt from ${model.data}`;
  at("model").textContent = `${model.name}, version ${model.version} (${model.alias})${learnt}`;
  at("model").className = "is-there";
  for (const text of [isSynthetic && "SYNTHETIC data", isRandom && "RANDOM WEIGHTS"].filter(Boolean)) {
    at("model").append(" ", Object.assign(document.createElement("span"), { className: "warn", textContent: text }));
  }
  at("synthetic").hidden = !isSynthetic;
  at("random").hidden = !isRandom;
}

async function lookForModel() {
  if (asksForKey === "yes" && !key.get()) {
    at("model").textContent = "Waiting for a key";
    showKeyForm();
    return;
  }
  try {
    showModel(await ask("/v1/model"));
  } catch (error) {
    at("model").textContent = error.message;
    at("model").className = "is-away";
    if (error.status === 401) showKeyForm();
  }
}

at("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) classify(file);
  event.target.value = ""; // so that the same file can be chosen again
});

for (const button of examples) {
  button.addEventListener("click", async () => {
    const drawing = button.querySelector("img");
    try {
      await drawing.decode();
    } catch {
      refuse(new Refused("This drawing could not be loaded. See that the server runs, then try again.", 0, 0), () =>
        location.reload(),
      );
      return;
    }
    classify(await png(drawing, drawing.naturalWidth, drawing.naturalHeight), button);
  });
}

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

at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(last);
    at("copy").textContent = "Copied";
  } catch {
    // Browsers keep the clipboard from pages without TLS: mark it, so that Ctrl-C takes it.
    getSelection().selectAllChildren(at("request-id"));
    at("copy").textContent = "Marked: press Ctrl-C";
  }
});

at("feedback").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.target.querySelector("button");
  const mine = turn;
  button.disabled = true;
  at("thanks").textContent = "";
  at("feedback-error").hidden = true;
  try {
    const { label } = await ask("/v1/feedback", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ request_id: last, index: 0, label: at("label").value }),
    });
    if (mine === turn) at("thanks").textContent = `Noted: ${label}. Thank you.`;
  } catch (error) {
    if (mine !== turn) return;
    at("feedback-error").textContent = inLines(error.message);
    at("feedback-error").hidden = false;
    if (error.status === 401) showKeyForm();
  } finally {
    button.disabled = false;
    // A button that was disabled has lost the keyboard's focus.
    if (document.activeElement === document.body) button.focus();
  }
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  hideError();
  at("file").focus();
  lookForModel();
});

lookForModel();
