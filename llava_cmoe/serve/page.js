"use strict";
(() => {
  const STEPS = 20; // of shades, as page.css has them
  const at = (id) => document.getElementById(id);
  const node = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
  const messageOf = (error) => (error.name === "AbortError" ? "stopped" : error.message);

  // What the page remembers; the key is kept nowhere else, and nothing outlives the page.
  let key = "", models = [], picture = null, turns = [], first = null, asking = null, cards = [];

  const tell = (text) => { at("problem").textContent = text; at("problem").hidden = !text; };

  const call = async (path, body, signal) => {
    const headers = {};
    // A header holds bytes; the server reads them as UTF-8.
    if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
    if (body) headers["Content-Type"] = "application/json";
    const method = body ? "POST" : "GET";
    const reply = await fetch(path, { method, headers, body: JSON.stringify(body), signal, credentials: "omit", cache: "no-store" });
    if (reply.ok) return reply;
    if (reply.status === 401) { at("keys").hidden = false; at("main").hidden = true; at("key").focus(); }
    const said = await reply.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answered ${reply.status}`);
  };

  // The answer of a model, shown while it grows; its text and what the server says of it.
  const answerOf = async (body, show, signal) => {
    const reply = await call("v1/chat/completions", { ...body, stream: true }, signal);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let unread = "", text = "", verdict = null;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the answer broke off");
      const events = (unread + value).split("\n\n");
      unread = events.pop();
      for (const event of events.filter((one) => one.startsWith("data: "))) {
        const data = event.slice(6);
        if (data === "[DONE]") return { text, verdict };
        const part = JSON.parse(data);
        if (part.error) throw new Error(part.error.message);
        text += part.choices[0]?.delta?.content ?? "";
        verdict = part.llava_cmoe ?? verdict;
        show(text);
      }
    }
  };

  const opening = (text) => ({
    role: "user",
    content: [{ type: "text", text }, ...(picture ? [{ type: "image_url", image_url: { url: picture } }] : [])],
  });
  const ofRun = (route, task = null) => models.find((one) => one.llava_cmoe.run === models[0].llava_cmoe.run
    && one.llava_cmoe.route === route && one.llava_cmoe.task === task);
  const modelNow = () => {
    const route = at("ask").elements.route.value;
    if (!models[0].llava_cmoe.route) return models[0];
    if (route === "located" && first) return first.task ? ofRun("oracle", first.task) : ofRun("base");
    return ofRun(route, route === "oracle" ? at("task").value : null);
  };

  const begin = () => {
    asking = new AbortController();
    tell("");
    for (const id of ["send", "compare", "anew", "remove", "picture"]) at(id).disabled = true;
    at("stop").disabled = false;
    return asking.signal;
  };
  const end = () => {
    asking = null;
    for (const id of ["send", "compare", "anew", "remove", "picture"]) at(id).disabled = false;
    at("stop").disabled = true;
  };

  const send = async () => {
    const text = at("question").value.trim();
    if (!text || asking) return;
    const signal = begin(), model = modelNow(), located = model.llava_cmoe.route === "located";
    const said = node("li", text, "user"), answer = node("li", "…", "assistant");
    at("talk").append(said, answer);
    at("question").value = "";
    const message = turns.length ? { role: "user", content: text } : opening(text);
    try {
      const found = await answerOf({ model: model.id, messages: [...turns, message], llava_cmoe: { experts: true } },
        (grown) => { answer.textContent = grown || "…"; }, signal);
      turns.push(message, { role: "assistant", content: found.text });
      if (located && !first) first = found.verdict;
      answer.textContent = found.text || "(empty)";
      answer.append(node("small", whose(found.verdict, model)));
      explain(found.verdict, model);
    } catch (error) {
      // What was not answered is not remembered.
      answer.append(node("small", messageOf(error), "wrong"));
      at("question").value ||= text;
      if (messageOf(error) !== "stopped") tell(messageOf(error));
    }
    end();
    at("question").focus();
  };

  const whose = (verdict, model) => {
    if (!model.llava_cmoe.route) return "answered alike for all tasks";
    const task = verdict.task ?? "the base model";
    if (verdict.located) return verdict.task ? `located: ${task}` : "no task fits: the base model answers";
    const kept = first && at("ask").elements.route.value === "located";
    return kept ? `${task}, as the first question was located` : `${task}, as chosen`;
  };

  const explain = (verdict, model) => {
    at("verdict").textContent = whose(verdict, model);
    const scores = verdict.scores ?? (at("ask").elements.route.value === "located" ? first?.scores : null);
    at("located").hidden = !scores;
    if (scores) at("scores").replaceChildren(...bars(scores, verdict.task));
    const sites = verdict.experts ?? [];
    at("experts").hidden = false;
    at("heat").replaceChildren(...(sites.length ? heat(sites) : [node("caption", "No experts took part.")]));
  };

  const bars = (scores, chosen) => {
    const all = Object.entries(scores).sort((one, other) => (one[1] ?? Infinity) - (other[1] ?? Infinity));
    const most = Math.max(1e-9, ...all.map(([, score]) => score ?? 0));
    return all.map(([task, score]) => {
      const row = node("tr", "", task === chosen ? "chosen" : ""), name = node("th", task), bar = node("span", "", "bar");
      const drawn = node("td");
      name.scope = "row";
      bar.style.width = `${100 * Math.max(0, score ?? most) / most}%`;
      drawn.append(bar);
      row.append(name, drawn, node("td", score === null ? "no end" : score.toFixed(2)));
      return row;
    });
  };

  const heat = (sites) => {
    const experts = [...new Set(sites.flatMap(({ shares }) => Object.keys(shares).map(Number)))].sort((a, b) => a - b);
    const head = document.createElement("thead"), body = document.createElement("tbody"), top = node("tr");
    for (const text of ["layer \\ expert", ...experts]) top.append(Object.assign(node("th", text), { scope: "col" }));
    head.append(top);
    for (const { label, site, shares } of [...sites].reverse()) {
      const row = node("tr");
      row.append(Object.assign(node("th", label), { scope: "row", title: site }));
      for (const expert of experts) {
        const share = shares[expert];
        row.append(share === undefined ? node("td") : node("td", Math.round(100 * share), `s${Math.round(STEPS * share)}`));
      }
      body.append(row);
    }
    return [head, body];
  };

  const sides = () => models.filter(({ llava_cmoe: { route, task } }) => task === null && route !== "base")
    .sort((one, other) => one.llava_cmoe.stages.length - other.llava_cmoe.stages.length)
    .map((model) => {
      const { run, stages } = model.llava_cmoe, card = node("li"), answer = node("p"), said = node("small");
      const learned = stages.length ? `after task ${stages.length}, ${stages.at(-1)}` : "nothing learned";
      card.append(node("h3", run), node("small", learned), answer, said);
      return { model, card, answer, said };
    });

  const compare = async () => {
    const text = at("question").value.trim() || turns[0]?.content[0].text;
    if (asking || (!text && !at("question").reportValidity())) return;
    const signal = begin();
    at("asked").textContent = text;
    at("asked").hidden = false;
    await Promise.all(cards.map(async ({ model, answer, said }) => {
      answer.textContent = "…";
      said.textContent = "";
      try {
        const found = await answerOf({ model: model.id, messages: [opening(text)] },
          (grown) => { answer.textContent = grown || "…"; }, signal);
        answer.textContent = found.text || "(empty)";
        said.textContent = whose(found.verdict, model);
      } catch (error) {
        said.textContent = messageOf(error);
      }
    }));
    end();
  };

  const forget = () => {
    turns = [];
    first = null;
    at("talk").replaceChildren();
    at("located").hidden = at("experts").hidden = at("asked").hidden = true;
    for (const { answer, said } of cards) answer.textContent = said.textContent = "";
    at("verdict").textContent = "Nothing was asked yet.";
    tell("");
  };
  const show = (url) => {
    picture = url;
    at("preview").hidden = at("remove").hidden = !url;
    if (url) at("preview").src = url;
    else { at("preview").removeAttribute("src"); at("picture").value = ""; }
    forget();
  };
  const look = (file) => {
    if (!file || asking) return;
    const reader = new FileReader();
    reader.onload = () => show(reader.result);
    reader.onerror = () => tell("the picture cannot be read");
    reader.readAsDataURL(file);
  };

  const start = async () => {
    try {
      models = (await (await call("v1/models")).json()).data;
    } catch (error) {
      tell(key || at("keys").hidden ? messageOf(error) : "");
      return;
    }
    tell("");
    at("keys").hidden = true;
    at("main").hidden = false;
    const { run, stages, route } = models[0].llava_cmoe;
    document.title = at("title").textContent = `Ask ${run}`;
    at("about").textContent = stages.length ? `It has learned ${stages.join(", ")}.` : "It has learned nothing yet.";
    at("routes").hidden = !route;
    at("task").replaceChildren(...stages.map((task) => node("option", task)));
    cards = sides();
    at("sides").replaceChildren(...cards.map(({ card }) => card));
  };

  at("keys").addEventListener("submit", (event) => {
    event.preventDefault();
    key = at("key").value;
    at("key").value = "";
    start();
  });
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  at("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  at("task").addEventListener("change", () => { at("ask").elements.route.value = "oracle"; });
  at("compare").addEventListener("click", compare);
  at("stop").addEventListener("click", () => asking?.abort());
  at("anew").addEventListener("click", forget);
  at("remove").addEventListener("click", () => show(null));
  at("picture").addEventListener("change", (event) => look(event.target.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    at("drop").addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") look(event.dataTransfer.files[0]);
    });
  }
  start();
})();
