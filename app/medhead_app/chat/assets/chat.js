// Draws the conversation in `props.value` (see view.py), changing only what differs, and stores it in the browser.
// gr.HTML provides element, props, trigger and watch.
const scroller = element.querySelector('.mh-scroll');
const hello = element.querySelector('.mh-hello');
const list = element.querySelector('.mh-messages');
const removed = element.querySelector('.mh-removed');
const announcer = element.querySelector('.mh-announcer');
const PREFIX = 'medhead:c:';
let drawn = [];      // the message that every node shows
let editing = -1;    // index of the message being edited
let current = null;  // id of the conversation
let known = 0;       // time of the stored state that this page has read or written

const make = (tag, cls, text) => {
  const node = document.createElement(tag);
  node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
};
const tool = (name, title, text) => {
  const button = make('button', 'mh-tool', text);
  button.type = 'button';
  button.dataset.tool = name;
  button.title = title;
  return button;
};
// What a tool does to the message whose name follows: its name for screen readers.
const ACTIONS = {
  copy: 'Copy', edit: 'Edit', retry: 'Regenerate', undo: 'Undo', continue: 'Continue', earlier: 'Earlier version of',
  later: 'Later version of', cancel: 'Discard the changes of', save: 'Send the edited',
};

function build(message) {
  const node = make('article', `mh-message mh-${message.role}`);
  if (message.role === 'assistant') node.append(make('div', 'mh-notice'));
  node.append(make('div', 'mh-body'));
  const foot = make('div', 'mh-foot');
  foot.append(make('span', 'mh-summary'));
  const tools = make('span', 'mh-tools');
  if (message.role === 'assistant') {
    const versions = make('span', 'mh-versions');
    versions.append(tool('earlier', 'Show the version before', '‹'), make('span', 'mh-version'), tool('later', 'Show the version after', '›'));
    tools.append(versions, tool('continue', 'Generate more of this answer', 'Continue'));
  }
  tools.append(tool('copy', 'Copy this message', 'Copy'));
  if (message.role === 'user') tools.append(tool('edit', 'Edit this message and answer it again', 'Edit'));
  else tools.append(tool('retry', 'Generate another answer', 'Regenerate'), tool('undo', 'Remove your message and this answer', 'Undo'));
  foot.append(tools);
  node.append(foot);
  return node;
}

function fill(node, message, before) {
  if (message.html !== before.html || message.name !== before.name) fillBody(node.querySelector('.mh-body'), message);
  if (message.name !== before.name) nameTools(node, message);
  node.classList.toggle('mh-generating', !!message.generating);
  if (message.role === 'assistant') {
    if (message.notice !== before.notice) node.querySelector('.mh-notice').textContent = message.notice;
    node.querySelector('.mh-versions').hidden = message.versions < 2;
    node.querySelector('.mh-version').textContent = `${message.version}/${message.versions}`;
    node.querySelector('[data-tool=earlier]').disabled = message.version === 1;
    node.querySelector('[data-tool=later]').disabled = message.version === message.versions;
  }
  if (message.summary !== before.summary) node.querySelector('.mh-summary').textContent = message.summary || '';
}

function nameTools(node, message) {
  node.setAttribute('aria-label', message.name[0].toUpperCase() + message.name.slice(1));
  for (const button of node.querySelectorAll('.mh-tool:not([data-tool=code])')) {
    button.setAttribute('aria-label', `${ACTIONS[button.dataset.tool]} ${message.name}`);
  }
}

// Replaces what differs from the first changed block on, so that a selection above it stays while text streams.
function fillBody(body, message) {
  const next = document.createElement('template');
  next.innerHTML = message.html;
  next.content.querySelectorAll('[data-tool=code]').forEach((button, index) => {
    button.setAttribute('aria-label', `Copy code ${index + 1} of ${message.name}`);
  });
  const old = [...body.childNodes], fresh = [...next.content.childNodes];
  let same = 0;
  while (same < old.length && same < fresh.length && old[same].isEqualNode(fresh[same])) same++;
  old.slice(same).forEach((node) => node.remove());
  body.append(...fresh.slice(same));
}

function draw() {
  const value = props.value || {};
  const messages = value.messages || [];
  const changed = value.id !== current;
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  const more = messages.length > drawn.length;
  if (changed) { list.replaceChildren(); drawn = []; editing = -1; current = value.id; }
  while (list.children.length > messages.length) { list.lastChild.remove(); drawn.pop(); }
  messages.forEach((message, index) => {
    if (drawn[index] && drawn[index].role !== message.role) {
      while (list.children.length > index) { list.lastChild.remove(); drawn.pop(); }
    }
    if (!list.children[index]) { list.append(build(message)); drawn[index] = {}; }
    if (index !== editing) fill(list.children[index], message, drawn[index]);
    drawn[index] = message;
  });
  hello.hidden = messages.length > 0;
  removed.hidden = !value.removed;
  list.classList.toggle('mh-cut', !!value.cut);
  if (element.classList.contains('mh-busy') && !value.busy && !changed) announce(messages.at(-1));
  element.classList.toggle('mh-busy', !!value.busy);
  if (atEnd || changed || more) scroller.scrollTop = scroller.scrollHeight;
  store(value, changed);
  follow();
}

// A screen reader reads an answer once, when it is complete.
function announce(message) {
  if (message && message.role === 'assistant') announcer.textContent = `${message.name}: ${message.text}`;
}

function read(name) {
  try { return JSON.parse(localStorage.getItem(name)); } catch (error) { return null; }
}

function store(value, changed) {
  if (!value.id) return;
  let failed = false;
  try {
    sessionStorage.setItem('medhead:current', value.id);  // of this tab
    localStorage.setItem('medhead:current', value.id);    // of the next tab
    if (value.store) {
      const name = PREFIX + value.id, other = read(name);
      if (other && other.updated !== known) keepCopy(other);
      if (value.store.messages.length) localStorage.setItem(name, JSON.stringify(value.store));
      else localStorage.removeItem(name);
    }
  } catch (error) { failed = true; }
  if (!failed && (value.store || !value.busy)) known = value.updated;
  if (changed || value.store) window.dispatchEvent(new CustomEvent('medhead:stored', { detail: { failed } }));
}

// Another tab has stored what this one has not seen: its conversation is kept as one of its own.
function keepCopy(conversation) {
  const id = Math.random().toString(36).slice(2);
  localStorage.setItem(PREFIX + id, JSON.stringify({ ...conversation, id }));
}

// Shows what another tab has made of this conversation. Answers may overtake each other, so that every drawing looks once more.
function follow() {
  const conversation = element.classList.contains('mh-busy') ? null : read(PREFIX + current);
  if (conversation && conversation.updated > known) trigger('sync', { conversation });
}
window.addEventListener('storage', (event) => { if (event.key === PREFIX + current) follow(); });

async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); }
  catch (error) {  // without permission, or on a page without HTTPS
    const area = make('textarea', 'mh-offscreen');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  announcer.textContent = 'Copied';
  if (button.textContent === 'Copied') return;
  const label = button.textContent;
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = label; }, 1200);
}

function startEdit(index) {
  const node = list.children[index], body = node.querySelector('.mh-body');
  editing = index;
  node.classList.add('mh-editing');
  const area = make('textarea', 'mh-edit');
  area.value = drawn[index].text;
  area.setAttribute('aria-label', `New text of ${drawn[index].name}`);
  area.rows = Math.min(8, 1 + Math.ceil(area.value.length / 60));
  const row = make('div', 'mh-edit-row');
  row.append(tool('cancel', 'Discard the changes', 'Cancel'), tool('save', 'Send the edited message', 'Send'));
  body.replaceChildren(area, row);
  nameTools(node, drawn[index]);
  area.focus();
  area.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') { event.preventDefault(); endEdit(); }
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); saveEdit(); }
  });
}

function endEdit() {
  if (editing < 0) return;
  const index = editing, node = list.children[index];
  editing = -1;
  if (!node) return;
  node.classList.remove('mh-editing');
  node.querySelector('.mh-body').replaceChildren();
  fill(node, drawn[index], {});
}

function saveEdit() {
  const index = editing, text = list.children[index].querySelector('.mh-edit').value;
  endEdit();
  if (text.trim()) trigger('ask', { action: 'edit', index, text });
}

element.addEventListener('click', (event) => {
  const example = event.target.closest('.mh-example');
  if (example) { trigger('ask', { action: 'example', text: example.textContent }); return; }
  const button = event.target.closest('.mh-tool');
  if (!button || button.disabled) return;
  const name = button.dataset.tool;
  const index = [...list.children].indexOf(button.closest('.mh-message'));
  if (name === 'copy') copy(drawn[index].text, button);
  else if (name === 'code') copy(button.parentElement.querySelector('code').textContent, button);
  else if (name === 'cancel') endEdit();
  else if (name === 'save') saveEdit();
  else if (element.classList.contains('mh-busy')) return;
  else if (name === 'edit') { endEdit(); startEdit(index); }
  else if (name === 'retry' || name === 'continue') trigger('ask', { action: name });
  else if (name === 'undo' || name === 'restore') trigger('modify', { action: name });
  else if (name === 'earlier' || name === 'later') trigger('modify', { action: 'version', step: name === 'later' ? 1 : -1 });
});

// Escape stops what the visible tab generates. In an open list or an edited message it only leaves that.
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.target.getAttribute('aria-expanded') === 'true') return;
  setTimeout(() => {
    if (event.defaultPrevented) return;
    const stop = [...document.querySelectorAll('#mh-stop, #mh-race-stop')].find((button) => button.offsetParent);
    if (stop) stop.click();
  }, 0);
}, true);

watch('value', draw);
draw();
