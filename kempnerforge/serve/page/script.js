"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const make = (tag, name = "", text = "") => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text) node.textContent = text;
    return node;
  };
  const LIMIT = 44 * 2 ** 20; // bytes of images; base64 makes them a third larger
  const HALO = "#000000";
  let facts = { colours: ["#E69F00"], has_images: true };
  let images = []; // {blob, bitmap, name}: what the next question is about
  let scene = null; // {image, marks}: what is shown
  let chosen = null; // a label that is pointed out
  let talk = []; // [prompt, answer] of this conversation, where the model takes earlier turns
  let running = null; // AbortController of the question that is being answered

  const atEnd = () => at("log").scrollHeight - at("log").scrollTop - at("log").clientHeight < 80;
  const toEnd = () => { at("log").scrollTop = at("log").scrollHeight; };

  // ---- the picture ---------------------------------------------------------------------------------------------------

  const all = (marks) => [...marks.boxes.map((m) => ({ ...m, box: true })), ...marks.points];
  const nothing = () => ({ boxes: [], points: [] });
  const labels = (marks) => [...new Set(all(marks).map((m) => m.label))];
  const colourOf = (marks, label) => facts.colours[labels(marks).indexOf(label) % facts.colours.length];

  function inkOn(colour) {
    const [r, g, b] = [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
    return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000000" : "#FFFFFF";
  }

  function paint(canvas, image, marks, scale, picked) {
    const width = (canvas.width = Math.max(1, Math.round(image.width * scale)));
    const height = (canvas.height = Math.max(1, Math.round(image.height * scale)));
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = scale < 4;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, 0, 0, width, height);
    const unit = Math.max(2, Math.min(width, height) / 220);
    pen.font = `600 ${Math.max(13, 6 * unit)}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    const tags = [];
    for (const mark of all(marks)) {
      const colour = colourOf(marks, mark.label);
      pen.globalAlpha = picked !== null && picked !== mark.label ? 0.25 : 1;
      if (mark.box) {
        const [x, y, w, h] = [mark.x0 * width, mark.y0 * height, (mark.x1 - mark.x0) * width, (mark.y1 - mark.y0) * height];
        for (const [line, ink] of [[2.4 * unit, HALO], [1.2 * unit, colour]]) {
          pen.lineWidth = line;
          pen.strokeStyle = ink;
          pen.strokeRect(x, y, w, h);
        }
        tags.push({ label: mark.label, colour, x, y, bottom: y + h });
      } else {
        const [x, y] = [mark.x * width, mark.y * height];
        for (const [radius, ink] of [[4.4 * unit, HALO], [3.7 * unit, "#FFFFFF"], [2.8 * unit, colour]]) {
          pen.fillStyle = ink;
          pen.beginPath();
          pen.arc(x, y, radius, 0, 7);
          pen.fill();
        }
        const named = tags.some((tag) => tag.dot && tag.label === mark.label);
        if (!named) tags.push({ dot: true, label: mark.label, colour, x: x - 4 * unit, y: y - 5 * unit, bottom: y + 5 * unit });
      }
    }
    const taken = [];
    for (const tag of tags) writeTag(pen, tag, unit, width, height, taken, picked);
    pen.globalAlpha = 1;
  }

  function writeTag(pen, tag, unit, width, height, taken, picked) {
    if (!tag.label) return;
    const [pad, tall] = [3 * unit, Math.max(13, 6 * unit) * 1.5];
    let text = tag.label;
    while (text.length > 1 && pen.measureText(text).width > width - 2 * pad) text = text.slice(0, -2).trimEnd() + "…";
    const wide = Math.min(width, pen.measureText(text).width + 2 * pad);
    const keep = (v, most) => Math.max(0, Math.min(v, most));
    const places = [tag.y - tall, tag.y, tag.bottom, tag.bottom - tall].map((y) => [keep(tag.x, width - wide), keep(y, height - tall)]);
    const overlap = ([x, y]) => taken.reduce((sum, [u, v, w]) =>
      sum + Math.max(0, Math.min(x + wide, u + w) - Math.max(x, u)) * Math.max(0, Math.min(y, v) + tall - Math.max(y, v)), 0);
    const [x, y] = places.reduce((best, place) => (overlap(place) < overlap(best) ? place : best));
    taken.push([x, y, wide]);
    pen.globalAlpha = picked !== null && picked !== tag.label ? 0.25 : 1;
    pen.fillStyle = tag.colour;
    pen.fillRect(x, y, wide, tall);
    pen.lineWidth = 1;
    pen.strokeStyle = HALO;
    pen.strokeRect(x, y, wide, tall);
    pen.fillStyle = inkOn(tag.colour);
    pen.fillText(text, x + pad, y + tall / 2, wide - 2 * pad);
  }

  function show() {
    const canvas = at("picture");
    canvas.hidden = !scene;
    at("empty").hidden = Boolean(scene);
    at("drop").classList.toggle("blank", !scene);
    at("save").hidden = !scene || !all(scene.marks).length;
    at("legend").replaceChildren();
    if (!scene) return;
    const frame = at("drop").getBoundingClientRect();
    const fit = Math.min(frame.width / scene.image.bitmap.width, frame.height / scene.image.bitmap.height);
    const dense = window.devicePixelRatio || 1;
    paint(canvas, scene.image.bitmap, scene.marks, fit * dense, chosen);
    canvas.style.width = `${canvas.width / dense}px`;
    canvas.style.height = `${canvas.height / dense}px`;
    const found = labels(scene.marks);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${scene.image.name}${found.length ? `; marked: ${found.join(", ")}` : ""}`);
    for (const label of found) at("legend").append(legend(label));
  }

  function legend(label) {
    const of = all(scene.marks).filter((m) => m.label === label);
    const button = make("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(chosen === label));
    const swatch = make("i", of[0].box ? "" : "dot");
    swatch.style.background = colourOf(scene.marks, label);
    button.append(swatch, make("span", "", `${label || (of[0].box ? "box" : "point")}${of.length > 1 ? ` × ${of.length}` : ""}`));
    button.addEventListener("click", () => {
      chosen = chosen === label ? null : label;
      const place = [...at("legend").children].indexOf(button.parentNode);
      show();
      at("legend").children[place].firstChild.focus();
    });
    const item = make("li");
    item.append(button);
    return item;
  }

  function look(image, marks) {
    scene = image ? { image, marks } : null;
    chosen = null;
    show();
    for (const thumb of at("thumbs").children) thumb.firstChild.setAttribute("aria-pressed", String(Boolean(scene) && thumb.image === scene.image));
  }

  at("save").addEventListener("click", () => {
    const canvas = make("canvas");
    const { bitmap, name } = scene.image;
    paint(canvas, bitmap, scene.marks, Math.max(1, Math.ceil(448 / Math.min(bitmap.width, bitmap.height))), null);
    canvas.toBlob((blob) => {
      const link = make("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${name.replace(/\.[^.]*$/, "")}-marked.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  });

  // ---- images --------------------------------------------------------------------------------------------------------

  function complain(text) {
    const low = atEnd();
    at("problem").textContent = text;
    at("problem").hidden = !text;
    if (low) toEnd();
  }

  async function add(files) {
    complain("");
    for (const file of files) {
      try {
        if (images.length >= facts.max_images) throw new Error(`at most ${facts.max_images} images`);
        if (images.reduce((sum, image) => sum + image.blob.size, file.size) > LIMIT) throw new Error("too large to send");
        const bitmap = await createImageBitmap(file).catch(() => { throw new Error("not an image that can be shown"); });
        images.push({ blob: file, bitmap, name: file.name || "pasted image" });
      } catch (error) {
        complain(`${file.name || "image"}: ${error.message}`);
      }
    }
    list();
    if (images.length) look(images[images.length - 1], nothing());
    at("prompt").focus();
  }

  function list() {
    at("tray").hidden = !images.length;
    at("thumbs").replaceChildren(...images.map((image) => {
      const item = make("li");
      item.image = image;
      const picture = make("button", "show");
      picture.type = "button";
      picture.title = image.name;
      picture.setAttribute("aria-label", `Show ${image.name}`);
      const small = make("canvas");
      small.width = small.height = 104;
      const scale = Math.max(104 / image.bitmap.width, 104 / image.bitmap.height);
      const [w, h] = [image.bitmap.width * scale, image.bitmap.height * scale];
      small.getContext("2d").drawImage(image.bitmap, (104 - w) / 2, (104 - h) / 2, w, h);
      picture.append(small);
      picture.addEventListener("click", () => look(image, nothing()));
      const remove = make("button", "drop-it", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove ${image.name}`);
      remove.addEventListener("click", () => {
        images = images.filter((other) => other !== image);
        list();
        look(images[images.length - 1] || null, nothing());
        at("prompt").focus();
      });
      item.append(picture, remove);
      return item;
    }));
  }

  const choose = () => at("files").click();
  at("choose").addEventListener("click", choose);
  at("more").addEventListener("click", choose);
  at("files").addEventListener("change", () => { add([...at("files").files]); at("files").value = ""; });
  const carried = (event) => [...(event.dataTransfer || event.clipboardData).files];
  addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.toggle("over", facts.has_images); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    if (facts.has_images) add(carried(event));
  });
  addEventListener("paste", (event) => { if (facts.has_images && carried(event).length) add(carried(event)); });

  // ---- questions -----------------------------------------------------------------------------------------------------

  const base64 = (blob) => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error("an image could not be read"));
    reader.readAsDataURL(blob);
  });

  async function* lines(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  function write(words, text) {
    words.replaceChildren(...text.split(/((?:<(?:loc|seg)\d+>)+|<\/?points?\b[^<>]*>)/).map((part, k) => (k % 2 ? make("span", "code", part) : document.createTextNode(part))));
  }

  function turn(prompt) {
    const node = make("div", "turn");
    node.append(make("div", prompt ? "question" : "question none", prompt || "no prompt"));
    const answer = make("div", "answer busy");
    answer.tabIndex = 0;
    answer.append(make("span", "words"), make("span", "meta", "…"));
    node.append(answer);
    at("hint").hidden = true;
    at("anew").hidden = false;
    at("log").append(node);
    return { node, answer, words: answer.firstChild, meta: answer.lastChild };
  }

  function select(entry) {
    for (const other of at("log").querySelectorAll(".answer")) other.setAttribute("aria-current", String(other === entry.answer));
    look(entry.image, entry.marks);
  }

  async function ask(prompt) {
    const stop = (running = new AbortController());
    busy(true);
    const asked = [...images];
    const entry = { ...turn(prompt), image: asked[0] || null, marks: nothing(), text: "" };
    entry.answer.addEventListener("click", () => { if (!String(getSelection())) select(entry); });
    entry.answer.addEventListener("keydown", (event) => { if (event.key === "Enter") select(entry); });
    select(entry);
    try {
      const body = { prompt, history: facts.has_turns ? talk : [], images: await Promise.all(asked.map((image) => base64(image.blob))) };
      for (const key of ["max_new_tokens", "temperature", "top_p", "seed"]) if (at(key).value !== "") body[key] = Number(at(key).value);
      const response = await fetch("/api/answers", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: stop.signal,
      });
      if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error || `the server says ${response.status}`);
      let ended = false;
      for await (const message of lines(response)) ended = heard(entry, message) || ended;
      if (!ended) throw new Error("the server went away");
      talk.push([prompt, entry.text]);
    } catch (error) {
      const low = atEnd();
      const lost = error instanceof TypeError ? "the server cannot be reached" : error.message;
      entry.meta.textContent = stop.signal.aborted ? "stopped" : lost;
      entry.node.classList.toggle("failed", !stop.signal.aborted);
      entry.answer.classList.remove("busy");
      if (low) toEnd();
    } finally {
      entry.answer.classList.remove("busy");
      running = null;
      busy(false);
    }
  }

  function heard(entry, message) {
    const low = atEnd();
    if ("waiting" in message) entry.meta.textContent = message.waiting ? `${message.waiting} before this one` : "waiting";
    if ("started" in message) entry.meta.textContent = "reading";
    if ("text" in message) {
      entry.text += message.text;
      entry.meta.textContent = "";
      write(entry.words, entry.text);
    }
    const done = message.done;
    const marks = message.marks || (done && done.marks);
    if (marks && JSON.stringify(marks) !== JSON.stringify(entry.marks)) {
      entry.marks = marks;
      if (entry.answer.getAttribute("aria-current") === "true") look(entry.image, marks);
    }
    if (done) {
      write(entry.words, (entry.text = done.answer));
      const speed = done.seconds > 0 ? `, ${Math.round(done.tokens / done.seconds)} a second` : "";
      entry.meta.textContent = `${done.tokens} token${done.tokens === 1 ? "" : "s"} in ${done.seconds.toFixed(2)} s${speed}`;
    }
    if (low) toEnd();
    if (message.error) throw new Error(message.error);
    return Boolean(done);
  }

  function busy(yes) {
    at("send").hidden = yes;
    at("stop").hidden = !yes;
  }

  function grow() {
    at("prompt").style.height = "auto";
    at("prompt").style.height = `${at("prompt").scrollHeight}px`;
  }

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    complain("");
    const prompt = at("prompt").value;
    at("prompt").value = "";
    grow();
    ask(prompt).then(() => at("prompt").focus());
    toEnd();
  });
  at("prompt").addEventListener("input", grow);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("ask").requestSubmit();
    }
  });
  at("anew").addEventListener("click", () => {
    if (running) running.abort();
    talk = [];
    at("anew").hidden = true;
    for (const node of at("log").querySelectorAll(".turn")) node.remove();
    at("hint").hidden = false;
    look(images[images.length - 1] || null, nothing());
    at("prompt").focus();
  });
  at("stop").addEventListener("click", () => running && running.abort());
  addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
  new ResizeObserver(show).observe(at("drop"));

  // ---- the model -----------------------------------------------------------------------------------------------------

  fetch("/api/model").then((response) => response.json()).then((given) => {
    facts = { ...facts, ...given };
    at("name").textContent = facts.name;
    document.title = `${facts.name} · KempnerForge`;
    document.body.classList.toggle("text-only", !facts.has_images);
    if (facts.has_turns) at("hint").textContent = "The model sees the images, this conversation so far, and the question.";
    at("facts").replaceChildren(...Object.entries(facts.about).map(([key, value]) => {
      const row = make("div");
      row.append(make("dt", "", key), make("dd", "", value));
      return row;
    }));
  }).catch(() => complain("the server cannot be reached"));
  show();
})();
