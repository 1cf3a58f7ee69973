"use strict";
// Fills the samples of each table, filters them, and shows what stands behind a token or a mark.
// Whatever data say is set as text: no string of theirs is ever parsed as markup.
(() => {
  const data = JSON.parse(document.getElementById("samples-json").textContent);
  const tip = document.getElementById("tip");

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Spaces and line ends that stand alone are made visible; text in a sample stays as it is.
  const visible = (text) => (text.trim() ? text : text ? JSON.stringify(text) : "(begins a character that the next tokens end)");
  const number = (value) => (value === null ? "not known" : String(Number(value.toPrecision(3))));

  // Colour: six steps up to the 95 % quantile of a measure over the table's samples.
  function reach(samples, at) {
    const found = [];
    for (const sample of samples)
      for (const part of sample.parts)
        for (const token of part.tokens) {
          const value = token[1][at];
          if (value !== null && value !== undefined) found.push(Math.abs(value));
        }
    found.sort((a, b) => a - b);
    return found.length ? found[Math.floor(0.95 * (found.length - 1))] || 1 : 1;
  }

  function shade(value, scale, most) {
    if (value === null || value === undefined) return "";
    const level = Math.min(6, Math.ceil((Math.abs(value) / most) * 6));
    if (!level) return "";
    return scale === "signed" ? (value > 0 ? `c${level}` : `h${level}`) : `h${level}`;
  }

  function key(measure, most) {
    const line = make("p", "key");
    line.append(`${measure.name}, ${measure.unit}:`);
    const add = (className, text) => {
      const swatch = make("i", className);
      swatch.setAttribute("aria-hidden", "true");
      line.append(swatch, text);
    };
    if (measure.scale === "signed") {
      add("h6", `${number(-most)} or less`);
      add("c6", `${number(most)} or more`);
    } else {
      add("h1", `${number(most / 6)}`);
      add("h3", `${number(most / 2)}`);
      add("h6", `${number(most)} or more`);
    }
    return line;
  }

  function place(at) {
    tip.hidden = false;
    const box = at.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, innerWidth - size.width - 8));
    const below = box.bottom + 8 + size.height < innerHeight;
    const top = below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8);
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  }

  const hide = () => { tip.hidden = true; };

  function showToken(at, sample, token) {
    tip.replaceChildren(make("b", "", visible(token[0])));
    sample.measures.forEach((measure, index) => {
      tip.append(make("div", "", `${measure.name} ${number(token[1][index])} ${measure.unit}`));
    });
    if (token[2].length) {
      const table = make("table");
      const caption = make("caption", "", `kept entries: ${sample.entries_are}`);
      const body = make("tbody");
      for (const [text, value] of token[2]) {
        const row = make("tr");
        row.append(make("td", "", visible(text)), make("td", "n", number(value)));
        body.append(row);
      }
      table.append(caption, body);
      tip.append(table);
    } else if (sample.entries_are) {
      tip.append(make("div", "aside", `kept entries: ${sample.entries_are.startsWith("none") ? sample.entries_are : "none"}`));
    }
    place(at);
  }

  // One stop of the tab key a sample; arrow keys go from token to token.
  function walk(event) {
    const token = event.target.closest(".token");
    if (!token) return;
    const all = [...token.closest(".sample").querySelectorAll(".token.scored")];
    const at = all.indexOf(token);
    const next = {
      ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10,
      Home: 0, End: all.length - 1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const target = all[Math.max(0, Math.min(all.length - 1, next))];
    token.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  }

  function tokensOf(sample, card) {
    let isFirst = true;
    for (const part of sample.parts) {
      if (part.name) card.append(make("h5", "", part.name));
      const text = make("div", "text");
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", `${part.name || "text"}; arrow keys go from token to token`);
      for (const token of part.tokens) {
        const isScored = token[1].some((value) => value !== null);
        const shown = token[0] || (isScored ? "\u00b7" : "");
        const span = make("span", isScored ? "token scored" : "token read", shown);
        if (isScored) {
          span.tabIndex = isFirst ? 0 : -1;
          isFirst = false;
          span.addEventListener("mouseenter", () => showToken(span, sample, token));
          span.addEventListener("mouseleave", hide);
          span.addEventListener("focus", () => showToken(span, sample, token));
          span.addEventListener("blur", hide);
        }
        text.append(span);
      }
      if (!sample.measures.length) text.tabIndex = 0;
      card.append(text);
    }
    if (sample.left_out) card.append(make("p", "aside", `${sample.left_out} more tokens are left out.`));
    for (const note of sample.notes) card.append(make("p", "aside", note));
    card.addEventListener("keydown", walk);
  }

  function colour(sample, card, at, most) {
    const spans = card.querySelectorAll(".token");
    let index = 0;
    for (const part of sample.parts)
      for (const token of part.tokens) {
        const span = spans[index++];
        const isScored = span.classList.contains("scored");
        const level = shade(token[1][at], sample.measures[at].scale, most);
        span.className = `token ${isScored ? "scored" : "read"} ${level}`.trim();
      }
  }

  function rankedOf(sample, card) {
    if (sample.parts.length) {
      const details = make("details");
      details.append(make("summary", "", `Text${sample.task ? ` of task ${sample.task}` : ""}`));
      for (const part of sample.parts) {
        details.append(make("h5", "", part.name));
        const text = make("div", "text", part.text);
        text.tabIndex = 0;
        details.append(text);
      }
      card.append(details);
    }
    const values = sample.lines.map((line) => line.value).filter((value) => value !== null);
    const low = Math.min(...values), high = Math.max(...values);
    const box = make("div", "scroll");
    const table = make("table", "ranked");
    const head = make("thead"), row = make("tr");
    for (const name of ["rank", sample.names_are, sample.values_are, ""]) {
      const cell = make("th", name === sample.values_are ? "n" : "", name);
      cell.scope = "col";
      row.append(cell);
    }
    head.append(row);
    const body = make("tbody");
    for (const line of sample.lines) {
      const one = make("tr"), name = make("td", "", line.name), bar = make("td");
      if (line.mark) name.append(" ", make("span", "right", `(${line.mark})`));
      if (line.value !== null) {
        const length = make("span", "length");
        length.style.width = `${high > low ? 100 * (line.value - low) / (high - low) : 100}%`;
        bar.append(length);
      }
      one.append(make("td", "", String(line.rank)), name, make("td", "n", number(line.value)), bar);
      body.append(one);
    }
    table.append(head, body);
    box.append(table);
    card.append(box);
  }

  function textOf(sample) {
    const parts = sample.parts.map((part) => part.text ?? part.tokens.map((token) => token[0]).join(""));
    const lines = (sample.lines || []).map((line) => line.name);
    return [...parts, ...lines, sample.id, sample.task || ""].join("\n").toLowerCase();
  }

  function field(label, control, className) {
    const box = make("label", className || "", label);
    box.append(control);
    return box;
  }

  function choice(options) {
    const select = make("select");
    for (const [value, text] of options) {
      const option = make("option", "", text);
      option.value = value;
      select.append(option);
    }
    return select;
  }

  function fill(box) {
    const samples = data[box.dataset.table];
    const measures = samples[0].measures || [];
    const mostOf = measures.map((_, at) => reach(samples, at));
    const filters = make("div", "filters");
    const search = make("input");
    search.type = "search";
    const split = choice([["", "all"], ...[...new Set(samples.map((s) => s.split))].map((s) => [s, s])]);
    filters.append(field("Text", search, "wide"), field("Split", split));
    const ranked = samples[0].kind === "ranked";
    const meanName = ranked ? "spread" : measures.length ? `mean ${measures[0].name}` : "";
    const means = samples.map((sample) => sample.mean).filter((mean) => mean !== null).sort((a, b) => a - b);
    const middle = means.length ? means[Math.floor(means.length / 2)] : 0;
    const level = choice([["all", "all"], ["high", `upper half (from ${number(middle)})`], ["low", "lower half"]]);
    const order = choice([["row", "row"], ["high", `highest ${meanName} first`], ["low", `lowest ${meanName} first`]]);
    if (meanName && means.length > 1) filters.append(field(meanName, level), field("Order", order));
    const measure = choice(measures.map((found, at) => [String(at), found.name]));
    if (measures.length > 1) filters.append(field("Colour by", measure));
    const count = make("p", "aside");
    count.setAttribute("role", "status");
    const keyBox = make("div"), list = make("div");
    const cards = samples.map((sample) => {
      const card = make("article", "sample");
      const title = make("h4", "", `row\u00a0${sample.row}`);
      title.append(make("span", "", sample.split), make("span", "", sample.id));
      if (sample.mean !== null && meanName) title.append(make("span", "", `${meanName} ${number(sample.mean)}`));
      card.append(title);
      (sample.kind === "ranked" ? rankedOf : tokensOf)(sample, card);
      return card;
    });
    const texts = samples.map(textOf);

    function paint() {
      if (!measures.length) return;
      const at = Number(measure.value || 0);
      keyBox.replaceChildren(key(measures[at], mostOf[at]));
      samples.forEach((sample, index) => colour(sample, cards[index], at, mostOf[at]));
    }

    function apply() {
      const asked = search.value.trim().toLowerCase();
      const shown = samples.map((sample, index) => index).filter((index) => {
        const { split: ownSplit, mean } = samples[index];
        const isHigh = mean !== null && mean >= middle;
        return (!asked || texts[index].includes(asked)) && (!split.value || ownSplit === split.value) &&
          (level.value === "all" || isHigh === (level.value === "high"));
      });
      if (order.value !== "row") {
        const sign = order.value === "high" ? -1 : 1;
        shown.sort((a, b) => sign * ((samples[a].mean ?? 0) - (samples[b].mean ?? 0)));
      }
      list.replaceChildren(...shown.map((index) => cards[index]));
      count.textContent = `${shown.length} of ${samples.length} samples`;
    }

    for (const type of ["input", "change"]) {
      for (const control of [search, split, level, order]) control.addEventListener(type, apply);
      measure.addEventListener(type, paint);
    }
    box.replaceChildren(filters, keyBox, count, list);
    paint();
    apply();
  }

  document.querySelectorAll(".samples").forEach(fill);

  // A chart's marks say their numbers in aria-label.
  document.querySelectorAll(".plot svg").forEach((svg) => {
    svg.addEventListener("mouseover", (event) => {
      const mark = event.target.closest("[aria-roledescription][aria-label]");
      const says = mark && !/^(axis|legend|title)/.test(mark.getAttribute("aria-roledescription"));
      if (!says) return hide();
      tip.replaceChildren(make("div", "", mark.getAttribute("aria-label")));
      place(mark);
    });
    svg.addEventListener("mouseleave", hide);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", () => { if (!document.activeElement?.matches?.(".token")) hide(); }, true);
})();
