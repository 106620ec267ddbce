"use strict";
// Everything of the records is text: nothing here makes markup of it.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const made = (kind, text, name) => {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};
