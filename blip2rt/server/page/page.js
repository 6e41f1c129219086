"use strict";
// One picture at a time. Captions and answers stream from /v1/chat/completions; alternatives come from /caption.
// The gallery, where the server has one, is searched by /search; a picture that is found can be asked about in turn.

const $ = (id) => document.getElementById(id);
const MAX_SIDE = 1024; // pixels: the model sees far fewer, and phones send large pictures
let model = null;
let picture = null; // {url: data URL, blob}
let running = null; // AbortController of the request under way
let searching = null; // that of the search under way

function headers(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) $("access").open = true;
  let message = `the server answers with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not JSON: the status has to do
  }
  throw new Error(message);
}

// What this server has: a model that writes, a gallery to search, or both.
async function look() {
  const response = await checked(await fetch("/v1/models", { headers: headers() }));
  const models = (await response.json()).data;
  model = models.find((row) => row.kind === "generative")?.id ?? null;
  $("model").textContent = models.map((row) => row.id).join(", ");
  $("ask-about").hidden = !model;
  const gallery = await fetch("/gallery", { headers: headers() });
  $("gallery").hidden = !gallery.ok;
  if (gallery.ok) {
    const count = (await gallery.json()).pictures;
    $("gallery-size").textContent = `${count.toLocaleString()} ${count === 1 ? "picture" : "pictures"}`;
  }
  showError("");
}

// Scale down and turn upright in the browser; what it cannot read goes to the server as it is.
async function prepare(file) {
  try {
    const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1 && file.size < 1e6) return file;
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve) => canvas.toBlob((blob) => resolve(blob || file), "image/png"));
  } catch {
    return file;
  }
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:;/, "data:image/unknown;"));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

// Send one question (or none: a caption) and write the pieces into `target` as they come.
async function stream(question, target, signal) {
  const content = [{ type: "image_url", image_url: { url: picture.url } }];
  if (question) content.push({ type: "text", text: question });
  const body = JSON.stringify({ model, stream: true, max_tokens: 40, messages: [{ role: "user", content }] });
  const response = await checked(
    await fetch("/v1/chat/completions", { method: "POST", headers: headers({ "content-type": "application/json" }), body, signal }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  target.textContent = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      target.textContent += part.choices[0]?.delta?.content ?? "";
    }
  }
}

// Run one request; a new one ends the old one.
async function run(target, action) {
  running?.abort();
  const mine = (running = new AbortController());
  showError("");
  $("more").disabled = $("send").disabled = true;
  target.classList.add("busy");
  try {
    await action(mine.signal);
    if (!target.textContent.trim()) target.textContent = "(no text)";
  } catch (error) {
    if (error.name !== "AbortError") {
      showError(error instanceof TypeError ? "the server cannot be reached" : error.message);
      if (target.textContent === "") target.textContent = "–";
    }
  } finally {
    target.classList.remove("busy");
    if (running === mine) {
      running = null;
      $("more").disabled = $("send").disabled = !picture;
    }
  }
}

async function take(file) {
  if (!file) return;
  const blob = await prepare(file);
  picture = { blob, url: await dataUrl(blob) };
  if ($("picture").src) URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(file);
  $("picture").alt = file.name || "the picture";
  $("picture").hidden = false;
  $("hint").hidden = true;
  $("alternatives").replaceChildren();
  $("talk").replaceChildren();
  $("caption").textContent = "";
  await run($("caption"), (signal) => stream("", $("caption"), signal));
}

async function alternatives() {
  const list = $("alternatives");
  list.replaceChildren();
  await run($("more"), async (signal) => {
    const form = new FormData();
    form.append("image", picture.blob, "picture");
    form.append("options", JSON.stringify({ num_beams: 5, num_return_sequences: 5 }));
    const response = await checked(await fetch("/caption", { method: "POST", headers: headers(), body: form, signal }));
    const result = (await response.json()).results[0];
    for (const row of [result, ...result.alternatives]) {
      const item = document.createElement("li");
      const score = document.createElement("span");
      score.textContent = ` ${row.score === null ? "" : row.score.toFixed(2)}`;
      item.append(row.text || "(no text)", score);
      list.append(item);
    }
  });
}

async function ask(event) {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !picture) return;
  const asked = document.createElement("dt");
  const answer = document.createElement("dd");
  asked.textContent = question;
  $("talk").append(asked, answer);
  $("question").value = "";
  await run(answer, (signal) => stream(question, answer, signal));
  $("question").focus();
}

// Pictures are fetched, not linked: a link could not carry the key.
async function showFound(row, signal) {
  const item = document.createElement("li");
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = `${row.score.toFixed(3)} ${row.id}`;
  figure.append(caption);
  item.append(figure);
  $("found").append(item);
  if (!row.picture) return;
  const response = await fetch(row.picture, { headers: headers(), signal });
  if (!response.ok) return; // its name has to do
  const blob = await response.blob();
  const image = document.createElement("img");
  image.alt = String(row.id);
  image.src = URL.createObjectURL(blob);
  image.onload = () => URL.revokeObjectURL(image.src);
  if (model) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Caption this picture";
    button.append(image);
    button.addEventListener("click", () => {
      $("drop").scrollIntoView({ block: "nearest" });
      take(new File([blob], String(row.id), { type: blob.type }));
    });
    figure.prepend(button);
  } else {
    figure.prepend(image);
  }
}

// A new search ends the old one.
async function search(event) {
  event.preventDefault();
  const text = $("wanted").value.trim();
  if (!text) return;
  searching?.abort();
  const mine = (searching = new AbortController());
  showError("");
  $("found").replaceChildren();
  $("search-status").textContent = "searching";
  $("search-status").classList.add("busy");
  try {
    const query = new URLSearchParams({ text, k: 24 });
    const response = await checked(await fetch(`/search?${query}`, { headers: headers(), signal: mine.signal }));
    const rows = (await response.json()).results;
    $("search-status").textContent = `${rows.length} found, best first`;
    await Promise.all(rows.map((row) => showFound(row, mine.signal)));
  } catch (error) {
    if (error.name === "AbortError") return;
    $("search-status").textContent = "";
    showError(error instanceof TypeError ? "the server cannot be reached" : error.message);
  } finally {
    if (searching === mine) $("search-status").classList.remove("busy");
  }
}

const drop = $("drop");
$("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = ""; // so that the same picture may be chosen again, after an error for example
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (model) take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => model && take([...event.clipboardData.files][0]));
$("more").addEventListener("click", alternatives);
$("ask").addEventListener("submit", ask);
$("search").addEventListener("submit", search);
$("key").addEventListener("change", () => look().catch((error) => showError(error.message)));
look().catch((error) => showError(error.message));
