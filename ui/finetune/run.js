// Draws one run from props.value. Runs once, when the component loads. Text is inserted with textContent only.

const CONFIRM_MS = 5000;  // how long Delete asks for confirmation
const byClass = (name, parent = element) => parent.querySelector('.' + name);
const buttons = [...element.querySelectorAll('.run-actions button')];
const buttonOf = action => buttons.find(button => button.dataset.action === action);
const log = byClass('run-log'), logDetails = byClass('run-logs');
let runId = null;  // the displayed run
let drawnAlarms = '';  // the displayed alarms as JSON
let confirmTimer = null;  // runs while Delete asks for confirmation

/** Formats a score with two decimals; "–" if unknown. */
const formatScore = value => value === null || value === undefined ? '–' : value.toFixed(2);
/** Sets an image's source if it differs, so that it does not flicker. */
const setSource = (image, url) => { if (image.getAttribute('src') !== url) image.src = url; };

/** Draws the snapshot: an introduction without a run, an error, or the run. */
function draw() {
  const data = props.value || null;
  const readable = Boolean(data && data.state);
  byClass('run-empty').hidden = Boolean(data);
  showText(byClass('run-error'), data && data.error);
  byClass('run').hidden = !readable;
  if (!readable) { runId = null; return; }
  if (data.run !== runId) resetControls(data);
  byClass('run').dataset.state = data.state;
  setText(byClass('run-name'), data.name);
  setText(byClass('run-badge'), data.badge);
  setText(byClass('run-summary'), data.summary);
  showText(byClass('run-message'), data.message);
  drawProgress(data.progress);
  drawActions(data.actions, data.note);
  drawAlarms(data.alarms, data.alarm_note);
  drawResult(data.result);
  drawProbe(data.probe);
  drawCurves(data.chart);
  drawPairs(data.result ? data.result.pairs : []);
  drawLog(data.log);
}

/** Resets rename form, log and Delete when another run is displayed. */
function resetControls(data) {
  runId = data.run;
  zoom = null;
  showRenameForm(false);
  logDetails.open = Boolean(data.progress) || data.state === 'failed';
  resetDelete();
}

/** Draws progress bar, phase and time left of a run that has not finished. */
function drawProgress(progress) {
  byClass('run-progress').hidden = !progress;
  if (!progress) return;
  const bar = byClass('run-bar'), known = progress.fraction !== null;
  bar.classList.toggle('indeterminate', !known);
  bar.style.setProperty('--fraction', known ? progress.fraction : 1);
  if (known) bar.setAttribute('aria-valuenow', Math.round(progress.fraction * 100)); else bar.removeAttribute('aria-valuenow');
  bar.setAttribute('aria-valuetext', progress.text);
  setText(byClass('run-phase'), progress.text);
  setText(byClass('run-time-left'), progress.time_left);
}

/** Shows the buttons whose actions are possible. Those that the visitor may not use are disabled, with the reason. */
function drawActions(actions, note) {
  for (const button of buttons) {
    const action = actions[button.dataset.action];
    button.hidden = !action;
    if (!action) continue;
    button.disabled = action.disabled;
    button.title = action.reason;
    if (action.reason) button.setAttribute('aria-describedby', 'run-note'); else button.removeAttribute('aria-describedby');
    if (button !== buttonOf('delete') || confirmTimer === null) setText(button, action.label);
  }
  showText(byClass('run-note'), note);
}

// ── Alarms ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Draws the alarms, each with the photo that shows it best. They are replaced only if they change, as they are announced. */
function drawAlarms(alarms, note) {
  byClass('run-alarms').hidden = !alarms.length;
  showText(byClass('run-alarm-note'), note);
  setText(element.querySelector('#run-alarms-title'), alarms.length > 1 ? alarms.length + ' alarms' : 'Alarm');
  const drawn = JSON.stringify([runId, alarms]);
  if (drawn === drawnAlarms) return;
  drawnAlarms = drawn;
  byClass('alarms').replaceChildren(...alarms.map(alarm => {
    const node = byClass('alarm-template').content.firstElementChild.cloneNode(true);
    byClass('alarm-title', node).append(alarm.title, ' ', createNode('small', '', alarm.step));
    byClass('alarm-message', node).textContent = alarm.message;
    byClass('alarm-advice', node).textContent = alarm.advice;
    const photo = alarm.photo;
    byClass('alarm-photos', node).hidden = !photo;
    if (!photo) return node;
    byClass('alarm-before', node).src = photo.before;
    byClass('alarm-before', node).alt = photo.name + ', unedited';
    byClass('alarm-after', node).src = photo.after;
    byClass('alarm-after', node).alt = photo.name + ', after: ' + photo.description;
    byClass('alarm-description', node).textContent = photo.description;
    return node;
  }));
}

// ── Result ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Draws verdict, warning and table of scores of a finished run. */
function drawResult(result) {
  const section = byClass('run-result');
  section.hidden = !result;
  if (!result) return;
  section.classList.toggle('wins', result.wins);
  setText(byClass('run-verdict'), result.verdict);
  showText(byClass('run-warning'), result.warning);
  setText(byClass('run-statistics'), result.statistics);
  const rows = result.rows.map(row => [row.name, row.base, row.tuned]);
  rows.push(['difference of the total', '', result.difference]);
  byClass('run-table').tBodies[0].replaceChildren(...rows.map(cells => {
    const row = createNode('tr');
    cells.forEach((text, column) => {
      const [mean, interval] = column ? text.split(' (') : [text];
      const cell = createNode(column ? 'td' : 'th', '', mean);
      if (!column) cell.scope = 'row';
      if (interval) cell.append(' ', createNode('small', '', '(' + interval));
      row.append(cell);
    });
    return row;
  }));
}

/** Draws held-out photos with the answers of the base and the tuned model. */
function drawPairs(pairs) {
  byClass('run-pairs').hidden = !pairs.length;
  byClass('pairs').replaceChildren(...pairs.map(pair => {
    const node = byClass('pair-template').content.firstElementChild.cloneNode(true);
    const before = byClass('pair-before', node);
    before.src = pair.before;
    before.alt = pair.photo + ', unedited';
    for (const side of pair.sides) {
      const figure = byClass('pair-' + side.name, node), image = figure.querySelector('img');
      image.src = side.src;
      image.alt = pair.photo + ', ' + side.name + ': ' + side.description;
      figure.querySelector('b').textContent = (side.name === 'base' ? 'Base ' : 'Tuned ') + formatScore(side.total);
      figure.querySelector('span').textContent = side.description;
    }
    return node;
  }));
}

// ── During training ─────────────────────────────────────────────────────────────────────────────────────────────────

/** Draws the probe photo before and after the latest answer, and thumbnails of earlier answers. */
function drawProbe(probe) {
  byClass('run-probe').hidden = !probe;
  if (!probe) return;
  setSource(byClass('probe-before'), probe.before);
  setSource(byClass('probe-after'), probe.after);
  byClass('probe-after').alt = 'The edited photo: ' + probe.description;
  setText(byClass('probe-step'), (probe.step ? 'After step ' + probe.step : 'Before training') + ' · reward ' + formatScore(probe.total));
  setText(byClass('probe-description'), probe.description);
  setText(byClass('probe-scores'), probe.scores.map(score => score.name + ' ' + formatScore(score.value)).join(' · '));
  byClass('probe-thumbnails').replaceChildren(...probe.thumbnails.map(thumbnail => {
    const item = createNode('li'), image = createNode('img');
    image.src = thumbnail.src;
    item.title = 'Step ' + thumbnail.step;
    image.alt = 'Step ' + thumbnail.step + ', reward ' + formatScore(thumbnail.total);
    item.append(image, createNode('span', '', formatScore(thumbnail.total)));
    return item;
  }));
}

// ── Curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const CURSOR = {sync: {key: 'run'}, points: {size: 6}, drag: {x: true, y: false, uni: 12}};
let chart = null;          // the drawn chart
let zoom = null;           // the visible steps [first, last], or null for all

const cssColour = name => getComputedStyle(byClass('run-curves')).getPropertyValue(name).trim();
const knownValues = series => series.values.filter(value => value !== null);
const visibleSeries = () => chart.series.filter(series => knownValues(series).length);
/** Whether every step has a value: series of rare values are drawn as points and are not smoothed. */
const isDense = series => knownValues(series).length > series.values.length / 2;

/** Exponential moving average without the bias of its start; null where a value is missing. */
function smooth(values, factor) {
  let sum = 0, weight = 0;
  return values.map(value => {
    if (value === null) return null;
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + 1 - factor;
    return sum / weight;
  });
}

/** Draws the reward curves, raw and smoothed, with their legend, and the KL divergence. */
function drawCurves(data) {
  byClass('run-curves').hidden = !data.steps.length;
  chart = data;
  if (!data.steps.length) return;
  const factor = Number(byClass('curve-smoothing').value), series = visibleSeries();
  const lines = series.flatMap(item => {
    const colour = cssColour('--line-' + item.name) || cssColour('--body-text-color'), dense = isDense(item);
    const style = {stroke: colour, spanGaps: true, dash: item.weight === 0 ? [5, 4] : undefined};
    const smoothed = {...style, name: item.name, values: dense ? smooth(item.values, factor) : item.values, width: item.name === 'reward' ? 2.6 : 1.6, points: {show: !dense, size: 6, fill: colour}};
    const raw = {...style, name: item.name + '-raw', values: item.values, width: 1, alpha: 0.3, points: {show: false}};
    return dense && factor > 0 ? [raw, smoothed] : [smoothed];
  });
  rewardPlot.draw(chart.steps, lines, runId);
  byClass('curve-reward').setAttribute('aria-label', series.map(item => {
    const known = knownValues(item);
    return item.label + ' from ' + formatScore(known[0]) + ' to ' + formatScore(known[known.length - 1]);
  }).join(', '));
  setText(byClass('curve-diversity'), data.diversity);
  const kl = data.kl.filter(value => value !== null), latest = kl.length ? kl[kl.length - 1].toFixed(3) : '';
  klPlot.draw(chart.steps, [{name: 'kl', values: data.kl, stroke: cssColour('--body-text-color-subdued'), width: 1.6, spanGaps: true, points: {show: false}}], runId);
  setZoom(zoom);
  byClass('curve-kl').setAttribute('aria-label', kl.length ? 'Latest ' + latest + ', maximum ' + Math.max(...kl).toFixed(3) : 'No values yet');
  drawLegend(rewardPlot.index);
}

/** Creates a plot over the steps. */
function createPlot(name, height, unit, range) {
  return new LinePlot(byClass(name), {
    height, range, scale: {time: false}, cursor: CURSOR,
    axes: [{label: 'step', incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], size: 32}, {label: unit, size: 46}],
    onCursor: drawLegend, onReset: () => setZoom(null), onSelect: (first, last) => setZoom([first, last]),
  });
}

const rewardPlot = createPlot('curve-reward', 230, 'score, 0 to 1', (low, high) => { const pad = Math.max(0.01, (high - low) * 0.06); return [low - pad, high + pad]; });
const klPlot = createPlot('curve-kl', 120, 'nats per token', (low, high) => [0, Math.max(1e-6, high) * 1.06]);

/** Shows the steps [first, last], or all of them (null). */
function setZoom(steps) {
  zoom = steps;
  byClass('curve-reset').hidden = !zoom;
  const first = chart.steps[0], last = chart.steps[chart.steps.length - 1];
  for (const plot of [rewardPlot, klPlot]) plot.setRange(...(zoom || [first, Math.max(last, first + 1)]));
}

/** Writes the values of all lines at one step; the latest ones without a step. */
function drawLegend(index) {
  const hovered = index !== null, list = byClass('curve-legend'), series = visibleSeries();
  setText(byClass('curve-at'), hovered ? 'step ' + chart.steps[index] : 'latest');
  if (list.children.length !== series.length)
    list.replaceChildren(...series.map(() => { const item = createNode('li'); item.append(createNode('i'), createNode('span'), createNode('small')); return item; }));
  series.forEach((item, position) => {
    const [, text, note] = list.children[position].children, known = knownValues(item);
    list.children[position].className = 'line line-' + item.name;
    setText(text, item.label + ' ' + formatScore(hovered ? item.values[index] : known[known.length - 1]));
    setText(note, item.weight === 0 ? ' weight 0' : '');
  });
  const kl = chart.kl.filter(value => value !== null), value = hovered ? chart.kl[index] : kl[kl.length - 1];
  setText(byClass('kl-latest'), value === null || value === undefined ? '' : value.toFixed(3));
}

byClass('curve-smoothing').addEventListener('input', () => drawCurves(chart));
byClass('curve-reset').addEventListener('click', () => setZoom(null));
new ResizeObserver(() => { if (chart) drawCurves(chart); }).observe(byClass('curve-reward'));

/** Shows the log; it follows new lines while it is scrolled to its end. */
function drawLog(text) {
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  logDetails.hidden = text === null;  // the log of another visitor's own photos is not shown
  if (log.textContent === text) return;
  log.textContent = text || '';
  if (atEnd) requestAnimationFrame(() => { log.scrollTop = log.scrollHeight; });
}

// ── Input ───────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Shows the form for a new name instead of the title, or the other way round. */
function showRenameForm(visible) {
  byClass('run-title').hidden = visible;
  byClass('run-rename').hidden = !visible;
}

/** Ends the confirmation of Delete. */
function resetDelete() {
  clearTimeout(confirmTimer);
  confirmTimer = null;
  setText(buttonOf('delete'), 'Delete');
}

/** Executes the action of a button; Delete asks for confirmation first. */
function runAction(action) {
  if (action === 'download') return trigger('download', {run: runId});
  if (action === 'rename') {
    showRenameForm(true);
    byClass('run-new-name').value = byClass('run-name').textContent;
    return byClass('run-new-name').select();
  }
  if (action === 'delete' && confirmTimer === null) {
    setText(buttonOf('delete'), 'Confirm delete');
    confirmTimer = setTimeout(resetDelete, CONFIRM_MS);
    return;
  }
  if (action === 'delete') resetDelete();
  trigger('act', {run: runId, action});
}

element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.classList.contains('run-rename-cancel')) showRenameForm(false);
  else if (button.dataset.action) runAction(button.dataset.action);
});
element.addEventListener('submit', event => {
  event.preventDefault();
  showRenameForm(false);
  trigger('act', {run: runId, action: 'rename', name: byClass('run-new-name').value});
});
logDetails.addEventListener('toggle', () => { log.scrollTop = log.scrollHeight; });
watch('value', draw);
draw();
