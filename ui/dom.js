// What the scripts of components share. Text is inserted with textContent only.

/** Creates an element with a class and a text. */
window.createNode = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

/** Sets an element's text if it differs, so that screen readers announce only changes. */
window.setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

/** Sets an element's text, and hides the element if the text is empty. */
window.showText = (node, text) => { setText(node, text || ''); node.hidden = !text; };
