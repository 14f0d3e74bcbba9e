// Draws one run from props.value; runs once, when the view loads. All text goes in with textContent.

const find = (name, part = element) => part.querySelector('.' + name);
const buttons = [...element.querySelectorAll('.run-actions button')];
const log = find('run-log'), logs = find('run-logs');
let shown = null;
let sure = null;  // the timer of a Delete that was pressed once

const digits = value => value === null || value === undefined ? '–' : value.toFixed(2);
const put = (part, words) => { if (part.textContent !== words) part.textContent = words; };
const source = (image, url) => { if (image.getAttribute('src') !== url) image.src = url; };

function say(part, words) {
  put(part, words || '');
  part.hidden = !words;
}

function node(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function draw() {
  const data = props.value || null;
  const there = Boolean(data && data.state);
  find('run-empty').hidden = Boolean(data);
  say(find('run-error'), data && data.error);
  find('run').hidden = !there;
  if (!there) { shown = null; return; }
  if (data.run !== shown) forget(data);
  find('run').dataset.state = data.state;
  put(find('run-name'), data.name);
  put(find('run-badge'), data.badge);
  put(find('run-about'), data.about);
  say(find('run-message'), data.message);
  drawProgress(data.progress);
  drawActions(data.actions);
  drawResult(data.result);
  drawProbe(data.probe);
  drawCurves(data.chart);
  drawPairs(data.result ? data.result.pairs : []);
  drawLog(data);
}

function forget(data) {
  shown = data.run;
  find('run-rename').hidden = true;
  find('run-title').hidden = false;
  logs.open = Boolean(data.progress) || data.state === 'failed';
  calm();
}

function drawProgress(progress) {
  find('run-progress').hidden = !progress;
  if (!progress) return;
  const bar = find('run-bar'), known = progress.share !== null;
  bar.classList.toggle('unknown', !known);
  bar.style.setProperty('--share', known ? progress.share : 1);
  if (known) bar.setAttribute('aria-valuenow', Math.round(progress.share * 100)); else bar.removeAttribute('aria-valuenow');
  bar.setAttribute('aria-valuetext', progress.words);
  put(find('run-words'), progress.words);
  put(find('run-left'), progress.left);
}

function drawActions(actions) {
  for (const button of buttons) {
    const wanted = actions[button.dataset.do];
    button.hidden = !wanted && !(button.dataset.do === 'cancel' && actions.cancelling);
    if (typeof wanted === 'string') put(button, wanted);
  }
  const cancel = buttons.find(button => button.dataset.do === 'cancel');
  cancel.disabled = Boolean(actions.cancelling);
  put(cancel, actions.cancelling ? 'Stopping at the next step' : 'Cancel');
}

// ── What came out ───────────────────────────────────────────────────────────────────────────────────────────────────

function drawResult(result) {
  const part = find('run-result');
  part.hidden = !result;
  if (!result) return;
  part.classList.toggle('wins', result.wins);
  put(find('run-verdict'), result.verdict);
  say(find('run-alarm'), result.alarm);
  put(find('run-facts'), result.facts);
  const rows = result.rows.map(row => [row.name, row.base, row.tuned]);
  rows.push(['difference of the total', '', result.difference]);
  find('run-table').tBodies[0].replaceChildren(...rows.map(cells => {
    const row = node('tr');
    cells.forEach((words, place) => {
      const [mean, interval] = place ? words.split(' (') : [words];
      const cell = node(place ? 'td' : 'th', '', mean);
      if (!place) cell.scope = 'row';
      if (interval) cell.append(' ', node('small', '', '(' + interval));
      row.append(cell);
    });
    return row;
  }));
}

function drawPairs(pairs) {
  find('run-pairs').hidden = !pairs.length;
  const parts = pairs.map(pair => {
    const part = find('pair-template').content.firstElementChild.cloneNode(true);
    const before = find('pair-before', part);
    before.src = pair.before;
    before.alt = pair.photo + ' as it is';
    for (const side of pair.sides) {
      const figure = find('pair-' + side.name, part), image = figure.querySelector('img');
      image.src = side.src;
      image.alt = pair.photo + ', ' + side.name + ': ' + side.words;
      figure.querySelector('b').textContent = (side.name === 'base' ? 'Base ' : 'Tuned ') + digits(side.total);
      figure.querySelector('span').textContent = side.words;
    }
    return part;
  });
  find('pairs').replaceChildren(...parts);
}

// ── While it learns ─────────────────────────────────────────────────────────────────────────────────────────────────

function drawProbe(probe) {
  find('run-probe').hidden = !probe;
  if (!probe) return;
  source(find('probe-before'), probe.before);
  source(find('probe-after'), probe.after);
  find('probe-after').alt = 'The photo after: ' + probe.words;
  put(find('probe-step'), (probe.step ? 'After step ' + probe.step : 'Before learning') + ' · reward ' + digits(probe.total));
  put(find('probe-words'), probe.words);
  put(find('probe-scores'), probe.scores.map(score => score.name + ' ' + digits(score.value)).join(' · '));
  find('probe-strip').replaceChildren(...probe.strip.map(one => {
    const part = node('li'), image = node('img');
    image.src = one.src;
    part.title = 'Step ' + one.step;
    image.alt = 'Step ' + one.step + ', reward ' + digits(one.total);
    part.append(image, node('span', '', digits(one.total)));
    return part;
  }));
}

function drawCurves(chart) {
  const some = chart.steps.length > 0;
  find('run-curves').hidden = !some;
  if (!some) return;
  const series = chart.series.filter(one => one.values.some(value => value !== null));
  const values = series.flatMap(one => one.values).filter(value => value !== null);
  const low = Math.min(...values), high = Math.max(...values), pad = Math.max(0.01, (high - low) * 0.06);
  curve(find('curve-reward'), chart.steps, series, low - pad, high + pad);
  put(find('curve-first'), 'step ' + chart.steps[0]);
  put(find('curve-last'), 'step ' + chart.steps[chart.steps.length - 1]);
  put(find('curve-high'), digits(high + pad));
  put(find('curve-low'), digits(low - pad));
  find('curve-reward').setAttribute('aria-label', series.map(one => {
    const known = one.values.filter(value => value !== null);
    return one.label + ' from ' + digits(known[0]) + ' to ' + digits(known[known.length - 1]);
  }).join(', '));
  find('curve-legend').replaceChildren(...series.map(one => {
    const known = one.values.filter(value => value !== null), part = node('li', mark(one));
    part.append(node('i'), document.createTextNode(one.label + ' ' + digits(known[known.length - 1])));
    if (one.weight === 0) part.append(node('small', '', ' not rewarded'));
    return part;
  }));
  const kl = chart.kl.filter(value => value !== null);
  put(find('curve-facts'), chart.facts);
  curve(find('curve-kl'), chart.steps, [{name: 'kl', weight: 1, values: chart.kl}], 0, Math.max(1e-6, ...kl) * 1.06);
  put(find('kl-now'), kl.length ? kl[kl.length - 1].toFixed(3) : '');
  find('curve-kl').setAttribute('aria-label', kl.length ? 'Now ' + kl[kl.length - 1].toFixed(3) + ', at most ' + Math.max(...kl).toFixed(3) : 'Nothing yet');
}

const mark = one => 'line line-' + one.name + (one.weight === 0 ? ' unused' : '');

function curve(svg, steps, series, low, high) {
  const [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number);
  const first = steps[0], span = Math.max(1, steps[steps.length - 1] - first);
  const x = place => steps.length === 1 ? 0 : (steps[place] - first) / span * width;
  const y = value => height - (value - low) / Math.max(1e-9, high - low) * height;
  const make = (name, attributes) => {
    const made = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const grid = [0.25, 0.5, 0.75].map(share => make('line', {class: 'grid', x1: 0, x2: width, y1: share * height, y2: share * height}));
  const lines = [...series].reverse().map(one => {
    const points = one.values.map((value, place) => value === null ? null : x(place).toFixed(1) + ',' + y(value).toFixed(1)).filter(Boolean);
    if (points.length === 1) points.push(width + ',' + points[0].split(',')[1]);
    return make('polyline', {class: mark(one), points: points.join(' ')});
  });
  svg.replaceChildren(...grid, ...lines);
}

function drawLog(data) {
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  if (log.textContent === data.log) return;
  log.textContent = data.log || '';
  if (atEnd) requestAnimationFrame(() => { log.scrollTop = log.scrollHeight; });
}

// ── What a person does ──────────────────────────────────────────────────────────────────────────────────────────────

function calm() {
  clearTimeout(sure);
  sure = null;
  put(buttons.find(button => button.dataset.do === 'delete'), 'Delete');
}

function press(button) {
  const what = button.dataset.do;
  if (what === 'download') return trigger('download', {run: shown});
  if (what === 'rename') {
    find('run-title').hidden = true;
    find('run-rename').hidden = false;
    find('run-new-name').value = find('run-name').textContent;
    return find('run-new-name').select();
  }
  if (what === 'delete' && sure === null) {
    put(button, 'Really delete?');
    sure = setTimeout(calm, 5000);
    return;
  }
  if (what === 'delete') calm();
  trigger('act', {run: shown, do: what});
}

element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.classList.contains('run-keep')) { find('run-rename').hidden = true; find('run-title').hidden = false; }
  else if (button.dataset.do) press(button);
});
element.addEventListener('submit', event => {
  event.preventDefault();
  find('run-rename').hidden = true;
  find('run-title').hidden = false;
  trigger('act', {run: shown, do: 'rename', name: find('run-new-name').value});
});
logs.addEventListener('toggle', () => { log.scrollTop = log.scrollHeight; });
watch('value', draw);
draw();
