// Asks by microphone, file or text; shows the answer, and for a chosen picture where each word fits.

const LONGEST = 60; // seconds of a recording
const LARGEST = 20 << 20; // bytes of a file
const MAX_SHOWN = 120;
const the = (id) => document.getElementById(id);
let answer = null; // {query, seconds, words, gallery, results}
let chosen = null; // the result in the dialog: {row, score, name}
let map = null; // {steps: [{word?, start, end, values [rows][columns]}], seconds}

// ---- asking ----

async function request(address, options) {
  const response = await fetch(address, options);
  const value = await response.json().catch(() => ({ error: `The page failed (${response.status}).` }));
  if (!response.ok) throw new Error(value.error);
  return value;
}

function tell(text, refused = false) {
  the("status").textContent = text;
  the("status").classList.toggle("refused", refused);
}

async function ask(address, body, busy, said) {
  const buttons = document.querySelectorAll("#ask button");
  tell(busy);
  for (const one of buttons) one.disabled = true;
  try {
    answer = await request(address, { method: "POST", body });
    showAnswer(said);
  } catch (error) {
    tell(error.message, true);
  } finally {
    for (const one of buttons) one.disabled = false;
  }
}

the("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = the("text").value.trim();
  ask("say", text, "Speaking and looking …", `“${text}”`);
});

function askFile(file) {
  if (!file) return;
  if (file.size > LARGEST) tell(`${file.name} is over ${LARGEST >> 20} MB; cut it.`, true);
  else ask("search?how=file", file, `Listening to ${file.name} …`, file.name);
}
the("file").addEventListener("change", () => {
  askFile(the("file").files[0]);
  the("file").value = ""; // the same file may be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a file dropped beside the field must not replace the page
    the("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") askFile(event.dataTransfer.files[0]);
  });
}

let stop = null; // ends the recording that runs

the("record").addEventListener("click", async () => {
  if (stop) return stop();
  try {
    await record();
  } catch (error) {
    const why = { NotAllowedError: "The browser was not allowed to use the microphone.",
      NotFoundError: "There is no microphone." };
    tell(why[error.name] ?? `The microphone cannot be used (${error.message}).`, true);
  }
});

async function record() {
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: {
      channelCount: 1,
      echoCancellation: false,
      noiseSuppression: false,
      autoGainControl: false,
    },
  });
  const context = new AudioContext();
  await context.audioWorklet.addModule("recorder.js");
  const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  const blocks = [];
  const began = performance.now();
  node.port.onmessage = ({ data }) => blocks.push(data);
  context.createMediaStreamSource(stream).connect(node);
  const clock = setInterval(() => {
    const seconds = (performance.now() - began) / 1000;
    the("record-label").textContent = `Stop, ${seconds.toFixed(0)} s`;
    if (seconds >= LONGEST - 1) stop();
  }, 250);
  stop = () => {
    stop = null;
    clearInterval(clock);
    for (const track of stream.getTracks()) track.stop();
    context.close();
    the("record").classList.remove("on");
    the("record-label").textContent = "Record";
    ask("search?how=recorded", wav(blocks, context.sampleRate), "Listening and looking …", "Your recording");
  };
  the("record").classList.add("on");
  the("record-label").textContent = "Stop";
  tell("Recording. Press the button again when you have said it.");
}

/** A 16-bit WAV file of one channel: a header of 44 bytes, then the samples. */
function wav(blocks, rate) {
  const count = blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const text = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * count, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * count, true);
  let at = 44;
  for (const block of blocks)
    for (const sample of block) {
      view.setInt16(at, Math.max(-1, Math.min(1, sample)) * 32767, true);
      at += 2;
    }
  return new Blob([view], { type: "audio/wav" });
}

// ---- the answer ----

function showAnswer(said) {
  the("found").hidden = false;
  the("sound").src = `sound/${answer.query}`;
  the("spoken").textContent = `${said}, ${answer.seconds.toFixed(1)} s`;
  the("rank").max = answer.gallery;
  the("missing").reset();
  showGrid();
  tell(`The ${answer.results.length} best of ${answer.gallery.toLocaleString("en")} pictures.`);
  the("found-heading").focus({ preventScroll: true });
  the("found").scrollIntoView({ block: "start" });
}

function showGrid() {
  the("grid").replaceChildren(...answer.results.map((result, i) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = new Image();
    image.src = `thumbnail/${result.row}`;
    image.alt = "";
    image.loading = i < 12 ? "eager" : "lazy";
    const facts = element("span", "facts");
    facts.append(element("b", "", `${i + 1}`), element("span", "", result.score.toFixed(2)));
    button.type = "button";
    button.setAttribute("aria-label", `Picture ${i + 1}, ${result.name}, score ${result.score.toFixed(2)}`);
    button.append(image, facts, element("span", "name", result.name));
    button.title = result.name;
    button.addEventListener("click", () => open(result, i + 1));
    item.append(button);
    return item;
  }));
  the("more").hidden = answer.results.length >= Math.min(MAX_SHOWN, answer.gallery);
}

function element(tag, kind, text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}

the("more").addEventListener("click", async () => {
  const before = answer.results.length;
  try {
    const k = Math.min(MAX_SHOWN, before + 24, answer.gallery);
    answer.results = (await request(`answer/${answer.query}?k=${k}`)).results;
    showGrid();
    the("grid").children[before].firstChild.focus();
    tell(`The ${answer.results.length} best of ${answer.gallery.toLocaleString("en")} pictures.`);
  } catch (error) {
    tell(error.message, true);
  }
});

const note = (said) =>
  request("verdict", { method: "POST", body: JSON.stringify({ query: answer.query, ...said }) });

async function noteMissing(rank) {
  try {
    await note({ rank });
    tell(rank ? `Noted: it was number ${rank}.` : "Noted: it was not found.");
  } catch (error) {
    tell(error.message, true);
  }
  the("status").scrollIntoView({ block: "nearest" });
}
the("missing").addEventListener("submit", (event) => {
  event.preventDefault();
  noteMissing(the("rank").valueAsNumber);
});
the("never").addEventListener("click", () => noteMissing(null));

// ---- one picture, and where each word fits ----

async function open(result, rank) {
  chosen = result;
  map = null;
  the("one-heading").textContent = `${rank}. ${result.name}`;
  the("large").src = `picture/${result.row}`;
  the("large").alt = result.name;
  the("noted").textContent = the("where").textContent = "";
  the("words").replaceChildren();
  for (const part of the("line").querySelectorAll(".part")) part.remove();
  for (const id of ["overlay", "words", "moment", "moment-label", "line", "play"]) the(id).hidden = true;
  the("map-hint").textContent = "Working out where it fits …";
  the("one").showModal();
  the("one-heading").focus();
  try {
    const found = await request(`map/${answer.query}/${result.row}`);
    if (chosen === result) showMap(found);
  } catch (error) {
    the("map-hint").textContent = error.message;
  }
}

function showMap(found) {
  map = found;
  const typed = "word" in map.steps[0];
  the("map-hint").textContent = typed
    ? "Bright: the parts that a word fits. Choose a word."
    : "Bright: the parts that the speech fits at a moment. Move along the recording.";
  for (const step of map.steps) {
    const part = element("span", "part");
    part.style.left = `${(100 * step.start) / map.seconds}%`;
    part.style.width = `${(100 * (step.end - step.start)) / map.seconds}%`;
    the("line").append(part);
  }
  if (typed)
    the("words").replaceChildren(...map.steps.map((step, i) => {
      const button = element("button", "", step.word);
      button.type = "button";
      button.append(element("small", "", `${step.start.toFixed(2)} s`));
      button.addEventListener("click", () => showStep(i));
      return button;
    }));
  the("moment").max = map.steps.length - 1;
  for (const id of ["overlay", "line", "play"]) the(id).hidden = false;
  the("words").hidden = !typed;
  the("moment").hidden = the("moment-label").hidden = typed;
  const highest = map.steps.map((step) => Math.max(...step.values.flat()));
  map.low = Math.min(...map.steps.map((step) => Math.min(...step.values.flat())));
  map.high = Math.max(...highest, map.low + 1e-9);
  showStep(highest.indexOf(Math.max(...highest)));
}

function showStep(i) {
  const step = map.steps[i];
  const rows = step.values.length, columns = step.values[0].length;
  const overlay = the("overlay");
  overlay.width = columns;
  overlay.height = rows;
  const pixels = new ImageData(columns, rows); // black, the more opaque the less it fits
  step.values.flat().forEach((value, p) => {
    pixels.data[4 * p + 3] = 200 * (1 - (value - map.low) / (map.high - map.low));
  });
  overlay.getContext("2d").putImageData(pixels, 0, 0);
  [...the("words").children].forEach((one, j) => one.setAttribute("aria-pressed", j === i));
  the("line").querySelectorAll(".part").forEach((one, j) => one.classList.toggle("now", j === i));
  const said = step.word ? `“${step.word}”` : `The speech at ${step.start.toFixed(1)} s`;
  the("moment").value = i;
  the("moment").setAttribute("aria-valuetext", `${step.start.toFixed(1)} seconds`);
  const best = step.values.flat().indexOf(Math.max(...step.values.flat()));
  const down = ["upper", "middle", "lower"][Math.floor((3 * (Math.floor(best / columns) + 0.5)) / rows)];
  const across = ["left", "centre", "right"][Math.floor((3 * ((best % columns) + 0.5)) / columns)];
  the("where").textContent = `${said} fits the ${down} ${across} best.`;
  place();
}

/** The patches lie over the square in the picture's middle. */
function place() {
  const { offsetWidth: width, offsetHeight: height, offsetLeft: left, offsetTop: top } = the("large");
  const side = Math.min(width, height);
  Object.assign(the("overlay").style, { width: `${side}px`, height: `${side}px`,
    left: `${left + (width - side) / 2}px`, top: `${top + (height - side) / 2}px` });
}
the("large").addEventListener("load", place);
new ResizeObserver(place).observe(the("large"));

the("moment").addEventListener("input", () => showStep(the("moment").valueAsNumber));
the("show").addEventListener("change", () => {
  the("overlay").style.visibility = the("show").checked ? "visible" : "hidden";
});

the("play").addEventListener("click", () => {
  const sound = the("sound");
  sound.currentTime = 0;
  sound.play();
  let shown = -1;
  the("where").ariaLive = "off"; // a screen reader would talk over the recording
  const follow = () => {
    const now = sound.currentTime;
    const goesOn = map && the("one").open && !sound.ended;
    if (!goesOn) {
      sound.pause();
      the("where").ariaLive = "polite";
      return;
    }
    the("head").style.left = `${(100 * now) / map.seconds}%`;
    const i = map.steps.findIndex((step) => step.start <= now && now < step.end);
    if (i >= 0 && i !== shown) showStep((shown = i));
    requestAnimationFrame(follow);
  };
  requestAnimationFrame(follow);
});

the("right").addEventListener("click", async () => {
  try {
    const { rank } = await note({ row: chosen.row });
    the("noted").textContent = `Noted: it was number ${rank}.`;
    const i = answer.results.indexOf(chosen);
    [...the("grid").children].forEach((one, j) => one.firstChild.classList.toggle("right", j === i));
  } catch (error) {
    the("noted").textContent = error.message;
  }
});
the("close").addEventListener("click", () => the("one").close());
