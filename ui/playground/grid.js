// The candidate grid: draws props.value, a snapshot from grid.py, and ranks the candidates with the sliders' weights.
// Runs once, when the grid is mounted. All text is set with textContent: text of models and users is never markup.

const find = (parent, className) => parent.querySelector('.' + className);
const fromTemplate = name => find(element, name + '-template').content.firstElementChild.cloneNode(true);
const columnsRoot = find(element, 'grid-columns');
const columnNodes = new Map();   // model name -> section
const cardNodes = new Map();     // 'model name/index' -> card
let weights = props.weights;
let run = null;

const format = value => value === null || value === undefined ? '–' : value.toFixed(2);
const keyOf = (column, candidate) => column.name + '/' + candidate.index;
const isScored = (data, candidate) => data.rewards.some(name => candidate.scores[name] !== undefined);

// ── Drawing a snapshot ──────────────────────────────────────────────────────────────────────────────────────────────

/** Draws props.value, keeping the nodes of the same run. */
function draw() {
  const data = props.value || null;
  const empty = !data || !data.columns;
  find(element, 'grid-empty').hidden = !empty;
  if (empty || data.run !== run) { columnsRoot.replaceChildren(); columnNodes.clear(); cardNodes.clear(); run = null; }
  if (empty) { score(); return; }
  if (run === null) {
    run = columnsRoot.dataset.run = data.run;
    columnsRoot.style.setProperty('--columns', data.columns.length);
    columnsRoot.dataset.output = data.output;
  }
  const started = !columnNodes.size && !data.label;
  for (const column of data.columns) drawColumn(data, column);
  score();
  if (started) scrollToFirstCard();
}

/** Scrolls to the first card where the results are below the inputs; the sliders stay above it. */
function scrollToFirstCard() {
  const card = find(columnsRoot, 'card');
  if (!card || !matchMedia('(max-width: 999px)').matches) return;
  const behavior = matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth';
  card.scrollIntoView({block: 'start', behavior: behavior});
}

/** Draws one model's column. */
function drawColumn(data, column) {
  let node = columnNodes.get(column.name);
  if (!node) {
    node = fromTemplate('column');
    node.setAttribute('aria-label', column.title);
    node.dataset.model = column.name;
    find(node, 'column-name').textContent = column.title;
    showText(find(node, 'column-note'), column.note);
    columnNodes.set(column.name, node);
    columnsRoot.append(node);
  }
  node.dataset.status = column.status;
  showText(find(node, 'column-status'), column.status_text);
  showText(find(node, 'column-error'), column.error);
  for (const candidate of column.candidates) drawCard(data, column, candidate, node);
}

/** Draws one candidate's card, without its scores. */
function drawCard(data, column, candidate, columnNode) {
  const key = keyOf(column, candidate);
  let card = cardNodes.get(key);
  if (!card) {
    card = fromTemplate('card');
    card.dataset.key = key;
    cardNodes.set(key, card);
    find(columnNode, 'cards').append(card);
  }
  card.dataset.status = candidate.status;
  const regions = JSON.stringify({boxes: candidate.boxes, points: candidate.points, path: candidate.path || undefined});
  card.clipboardText = candidate.recipe || (data.output === 'regions' ? regions : candidate.text);
  drawPicture(data, candidate, card);
  showText(find(card, 'card-text'), candidate.text);
  setText(find(card, 'card-recipe-text'), candidate.recipe);
  find(card, 'card-recipe').hidden = !candidate.recipe;
  showText(find(card, 'card-problems'), candidate.problems);
  showText(find(card, 'card-details'), candidate.details);
  drawReasoning(candidate.reasoning || [], card);
  card.hidden = candidate.same_as !== candidate.index;
  const count = column.candidates.length;
  showText(find(card, 'card-agree'), candidate.agree > 1 ? candidate.agree + ' of ' + count + ' agree' : '');
  find(card, 'card-copy').hidden = candidate.status !== 'ready';
  find(card, 'card-download').hidden = find(card, 'card-prefer').hidden = !candidate.recipe;
  const label = column.title + ', candidate ' + (candidate.index + 1);
  const copied = {recipe: 'recipe', text: 'text', regions: 'coordinates'}[data.output];
  find(card, 'card-copy').setAttribute('aria-label', 'Copy ' + copied + ' of ' + label);
  find(card, 'card-prefer').setAttribute('aria-label', 'Prefer ' + label);
  find(card, 'card-download').setAttribute('aria-label', 'Download picture of ' + label + ' in full size');
  find(card, 'card-enlarge').setAttribute('aria-label', 'Full-screen view of ' + label);
  find(card, 'card-enlarge').hidden = !candidate.done;
  find(card, 'card-divider').setAttribute('aria-label', 'Before and after of ' + label);
  card.dataset.label = label;
}

/** Draws the reasoning; text that refers to the points on the photo is highlighted. */
function drawReasoning(parts, card) {
  find(card, 'card-reasoning-details').hidden = !parts.length;
  const node = find(card, 'card-reasoning');
  if (node.textContent === parts.map(part => part[0]).join('')) return;
  node.replaceChildren(...parts.map(([text, grounded]) => {
    const part = document.createElement(grounded ? 'mark' : 'span');
    part.textContent = text;
    return part;
  }));
}

/** Draws the rendered picture, or the photo with the regions found on it. */
function drawPicture(data, candidate, card) {
  const frame = find(card, 'card-frame'), after = find(card, 'card-after'), before = find(card, 'card-before');
  const hasRegions = candidate.boxes.length || candidate.points.length || candidate.path;
  const source = data.output === 'regions' || hasRegions ? data.photo.src : candidate.picture;
  frame.hidden = (data.output === 'text' && !hasRegions) || (data.output === 'recipe' && candidate.done && !candidate.picture);
  frame.style.aspectRatio = data.photo.width + ' / ' + data.photo.height;
  if (source && after.getAttribute('src') !== source) after.setAttribute('src', source);
  after.alt = candidate.alt || '';
  for (const name of ['card-divider', 'card-line', 'card-before-label']) find(card, name).hidden = !candidate.picture;
  before.hidden = !candidate.picture;
  if (candidate.picture && !before.hasAttribute('src')) before.setAttribute('src', data.photo.src);
  if (hasRegions && candidate.done && card.dataset.regions !== 'drawn') drawRegions(data, candidate, card);
}

/** Draws boxes, points and the outline over the photo. */
function drawRegions(data, candidate, card) {
  const svg = find(card, 'card-regions'), width = data.photo.width, height = data.photo.height;
  svg.setAttribute('viewBox', '0 0 ' + width + ' ' + height);
  const add = (name, attributes) => {
    for (const className of ['region-halo', 'region-line']) {
      const node = document.createElementNS('http://www.w3.org/2000/svg', name);
      node.setAttribute('class', className);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      svg.append(node);
    }
  };
  for (const [left, top, right, bottom] of candidate.boxes)
    add('rect', {x: left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height});
  for (const [x, y] of candidate.points) add('circle', {cx: x * width, cy: y * height, r: Math.max(width, height) / 45});
  if (candidate.path) add('path', {d: candidate.path, transform: 'scale(' + width + ' ' + height + ')', 'vector-effect': 'non-scaling-stroke'});
  card.dataset.regions = 'drawn';
}

// ── Scoring: on every snapshot and every move of a slider ───────────────────────────────────────────────────────────

/** Computes totals, ranks the cards of each column and marks the best ones. */
function score() {
  const data = props.value;
  setText(find(element, 'grid-status'), (data && data.status) || '');
  showText(find(element, 'grid-label'), data && data.label);
  const notice = find(element, 'grid-notice'), byReward = find(element, 'grid-sort');
  byReward.hidden = !data || !data.columns || !data.columns.some(column => column.candidates.some(candidate => isScored(data, candidate)));
  if (!data || !data.columns || data.output !== 'recipe') { showText(notice, ''); return; }
  const allZero = Object.values(weights).every(weight => !(weight > 0));
  showText(notice, allZero ? 'All sliders are at zero, so the candidates cannot be ranked. Increase at least one.' : '');
  let best = null;
  for (const column of data.columns) {
    const totals = column.candidates.map(candidate => total(weights, candidate.scores));
    const order = ranking(totals);
    sortCards(column, byReward.firstElementChild.checked ? order : column.candidates.map((_, index) => index));
    const shown = order.filter(index => !cardNodes.get(keyOf(column, column.candidates[index])).hidden);
    shown.forEach((index, rank) => scoreCard(data, column, column.candidates[index], totals[index], rank));
    scoreColumn(data, column, totals);
    const first = shown[0];
    if (totals[first] !== null && totals[first] !== undefined && (!best || totals[first] > best.total))
      best = {key: keyOf(column, column.candidates[first]), total: totals[first]};
  }
  for (const [key, card] of cardNodes) {
    if (card.hidden) card.dataset.rank = '';
    card.dataset.best = best && key === best.key ? 'all' : card.dataset.rank === '1' ? 'model' : '';
    const label = {all: 'Best overall', model: 'Best of this model', '': ''}[card.dataset.best];
    showText(find(card, 'card-badge'), data.columns.length === 1 && label ? 'Best' : label);
  }
}

/** Shows a candidate's total, rank (0 is best) and scores. */
function scoreCard(data, column, candidate, value, rank) {
  const card = cardNodes.get(keyOf(column, candidate)), scored = isScored(data, candidate);
  find(card, 'card-score').hidden = !scored;
  card.dataset.rank = value === null ? '' : String(rank + 1);
  if (!scored) return;
  card.dataset.total = value === null ? '' : String(value);
  setText(find(card, 'card-total'), format(value));
  setText(find(card, 'card-rank'), value === null ? '' : 'No. ' + (rank + 1));
  drawScores(find(card, 'card-scores'), data.rewards, candidate.scores);
}

/** Draws one bar per reward. */
function drawScores(list, names, scores) {
  if (!list.children.length)
    for (const name of names) {
      const row = document.createElement('div'), term = document.createElement('dt'), bar = document.createElement('dd');
      bar.append(document.createElement('i'), document.createElement('span'));
      term.textContent = name;
      row.append(term, bar);
      list.append(row);
    }
  names.forEach((name, index) => {
    const row = list.children[index], value = scores[name], text = format(value);
    const [fill, number] = row.lastChild.children;
    if (number.textContent !== text) {
      number.textContent = text;
      fill.style.setProperty('--share', value || 0);
      row.title = value === null || value === undefined ? 'Does not apply to this picture' : '';
    }
    row.classList.toggle('unweighted', !(weights[name] > 0));
  });
}

/** Shows the means of a column. */
function scoreColumn(data, column, totals) {
  const node = find(columnNodes.get(column.name), 'column-mean');
  const value = mean(totals);
  node.hidden = !column.candidates.some(candidate => isScored(data, candidate));
  node.dataset.mean = value === null ? '' : String(value);
  setText(find(node, 'mean-total'), format(value));
  const means = data.rewards.map(name => name + ' ' + format(mean(column.candidates.map(candidate => candidate.scores[name]))));
  setText(find(node, 'mean-scores'), means.join(' · '));
}

/** Sorts a column's cards. The focused card is never moved, because it would lose the focus; the others move around it. */
function sortCards(column, order) {
  const list = find(columnNodes.get(column.name), 'cards');
  const sorted = order.map(index => cardNodes.get(keyOf(column, column.candidates[index])));
  if (sorted.every((card, rank) => list.children[rank] === card)) return;
  const focused = list.contains(document.activeElement) ? document.activeElement.closest('.card') : null;
  const focusedRank = sorted.indexOf(focused);
  sorted.forEach((card, rank) => {
    if (focusedRank < 0 && list.children[rank] !== card) list.insertBefore(card, list.children[rank]);
    if (focusedRank >= 0 && card !== focused) list.insertBefore(card, rank < focusedRank ? focused : null);
  });
}

// ── Actions: before/after, copy, download ───────────────────────────────────────────────────────────────────────────

/** Shows the photo on the left of the divider, and the picture on its right. */
function drawDivider(divider) {
  const frame = divider.parentElement;
  frame.style.setProperty('--split', divider.value + '%');
  frame.classList.toggle('split', divider.value > 0);
  divider.setAttribute('aria-valuetext', divider.value + ' % before');
}

/** Copies a card's text to the clipboard. */
async function copyText(card, button) {
  try { await navigator.clipboard.writeText(card.clipboardText); button.textContent = 'Copied'; } catch { button.textContent = 'Copy failed'; }
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
}

/** Sends that a card should rank first; the panel of choices shows what follows. */
function preferCard(model, index, button) {
  const keep = document.querySelector('#preferences .keep-photo');
  trigger('prefer', {model, index, keep: Boolean(keep && keep.checked)});
  button.textContent = 'Preferred';
  setTimeout(() => { button.textContent = 'Prefer'; }, 1500);
}

element.addEventListener('click', event => {
  const card = event.target.closest('.card');
  if (!card) return;
  const model = card.closest('.model-column').dataset.model, index = Number(card.dataset.key.split('/').pop());
  if (event.target.closest('.card-download')) trigger('download', {model: model, index: index});
  else if (event.target.closest('.card-prefer')) preferCard(model, index, event.target.closest('.card-prefer'));
  else if (event.target.closest('.card-copy')) copyText(card, event.target.closest('.card-copy'));
  else if (event.target.closest('.card-enlarge')) openViewer(card);
});
element.addEventListener('input', event => { if (event.target.matches('.card-divider')) drawDivider(event.target); });
find(element, 'grid-sort').addEventListener('change', score);

// ── Queue ───────────────────────────────────────────────────────────────────────────────────────────────────────────

// Gradio writes the position of a waiting comparison over the grid, as "queue: 2/5". style.css hides that text.
const block = element.closest('#candidates'), busy = find(element, 'grid-busy');
let busyTimer = null;
const queuePosition = () => {
  const progress = block.querySelector('[data-testid="status-tracker"] .progress-text');
  const match = progress && /queue: *(\d+)\//.exec(progress.textContent);
  return match ? Number(match[1]) : 0;
};

/** Shows the position in the queue; not to those who wait for less than half a second. */
function drawBusy() {
  busyTimer = null;
  const position = queuePosition(), ahead = position - 1;
  const others = ahead === 1 ? '1 comparison waits' : ahead + ' comparisons wait';
  showText(busy, !position ? '' : 'Busy: position ' + position + ' in the queue. ' + (ahead ? others + ' before yours.' : 'Your comparison is next.'));
}
new MutationObserver(() => {
  if (busyTimer === null && (queuePosition() || !busy.hidden)) busyTimer = setTimeout(drawBusy, 500);
}).observe(block, {subtree: true, childList: true, characterData: true});

// A link to other settings replaces the example when the page has opened: style.css hides it until then.
columnsRoot.classList.toggle('linked', /[?&](photo|models|skill|prompt|length|n|temperature|seed)=/.test(location.search));
document.addEventListener('playground-weights', event => { weights = event.detail; score(); });
watch('value', draw);
draw();
