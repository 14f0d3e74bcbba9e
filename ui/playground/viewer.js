
// ── Full-screen view of the cards; arrow keys show the next one ─────────────────────────────────────────────────────

const viewer = find(element, 'viewer');
let viewed = null;   // the card that is shown

/** Cards that can be shown, in the order of the page. */
const viewable = () => [...cardNodes.values()].filter(card => !card.hidden && card.dataset.status === 'ready')
  .sort((a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);

/** Shows a card in full screen. */
function openViewer(card) {
  viewed = card;
  drawViewer();
  if (!viewer.open) viewer.showModal();
}

/** Draws the card that is shown: a copy of its frame, with a divider of its own. */
function drawViewer() {
  const frame = find(viewed, 'card-frame').cloneNode(true), total = find(viewed, 'card-total').textContent;
  frame.querySelector('.card-enlarge').remove();
  const [width, height] = frame.style.aspectRatio.split('/').map(Number);
  frame.style.setProperty('--ratio', width / height);
  find(viewer, 'viewer-frame').replaceChildren(...(frame.hidden ? [] : [frame]));
  drawDivider(frame.querySelector('.card-divider'));
  const cards = viewable(), parts = [viewed.dataset.label, total && 'reward ' + total, find(viewed, 'card-agree').textContent];
  setText(find(viewer, 'viewer-title'), parts.filter(Boolean).join(' · ') + ' (' + (cards.indexOf(viewed) + 1) + ' of ' + cards.length + ')');
  setText(find(viewer, 'viewer-text'), find(viewed, 'card-text').textContent);
}

/** Shows the card that is `step` further on, from the last to the first. */
function moveViewer(step) {
  const cards = viewable();
  viewed = cards[(cards.indexOf(viewed) + step + cards.length) % cards.length];
  drawViewer();
}

viewer.addEventListener('keydown', event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!step || event.target.matches('.card-divider')) return;   // on the divider, arrow keys move it
  event.preventDefault();
  moveViewer(step);
});
viewer.addEventListener('click', event => {
  if (event.target.closest('.viewer-close') || event.target === viewer) viewer.close();
  else if (event.target.closest('.viewer-previous')) moveViewer(-1);
  else if (event.target.closest('.viewer-next')) moveViewer(1);
});
viewer.addEventListener('close', () => { if (viewed && viewed.isConnected) find(viewed, 'card-enlarge').focus(); });
